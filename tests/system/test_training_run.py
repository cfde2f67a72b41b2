"""What a run trains, at which rates, by which loss; what it leaves behind; what it says about bad data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import Spy, configuration, corpus, curve

from steermoe.data import TooManyBadRows
from steermoe.run_checkpoints import verify
from steermoe.statistics import STATISTICS_NAME, read_statistics
from steermoe.trainer import GROUPS, parameter_groups
from steermoe.training import build, train
from steermoe.training_arguments import score_of, training_arguments
from steermoe.training_config import TRAINING_CONFIG_NAME
from steermoe_kernels import reference
from steermoe_kernels.encoders import describe_encoder

Backbones = tuple[Path, Path]


@pytest.fixture(scope="module")
def backbones(tiny_encoder: Path, tiny_language_model: Path) -> Backbones:
    return tiny_encoder, tiny_language_model


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("clips"))


def test_a_handful_of_clips_is_learnt(backbones: Backbones, tmp_path: Path) -> None:
    """As far as a language model of random weights can be led at all: the loss falls by a third and more in 60 steps."""
    letters = corpus(tmp_path / "letters", texts=tuple("abcdefgh"))
    rates = {"steering_learning_rate": 0.1, "projection_learning_rate": 0.1}
    config = configuration(backbones, letters, tmp_path / "run", max_steps=60, batch_size=8, logging_steps=5, **rates)
    spy = Spy()
    before, _ = build(config.model, seed=config.training.seed)
    result = train(config, callbacks=[spy])
    losses = [loss for _, loss in result.losses]
    assert result.steps == 60 and len(losses) == 12
    assert losses[-1] < 0.65 * losses[0], losses
    # Every part of the aligner moved, nothing else did, and nothing else was asked to.
    trained, untrained = result.model.trained_parameters(), before.trained_parameters()
    assert all(not torch.equal(trained[name], untrained[name]) for name in trained)
    frozen = {name: value for name, value in result.model.state_dict().items() if name not in _all_names(result.model, trained)}
    original = before.state_dict()
    assert len(frozen) > 20 and all(torch.equal(value, original[name]) for name, value in frozen.items())
    held = {id(parameter) for group in spy.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trained.values()}
    states = spy.optimizer.state
    assert {id(parameter) for parameter in states} == held
    assert all(parameter.grad is None or id(parameter) in held for parameter in result.model.parameters())
    assert spy.modes == {(True, False)}, "the backbones must stay in eval mode while the model trains"


def _all_names(model: Any, trained: dict[str, torch.nn.Parameter]) -> set[str]:
    own = {parameter.data_ptr() for parameter in trained.values()}
    return {name for name, value in model.state_dict().items() if value.data_ptr() in own}


def test_three_rates_reach_the_optimizer_and_survive_the_schedule(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    rates = {"steering": 1e-2, "router": 3e-3, "projection": 5e-4}
    spy = Spy()
    result = train(
        configuration(
            backbones,
            clips,
            tmp_path,
            schedule="linear",
            warmup_steps=4,
            max_steps=8,
            logging_steps=1,
            **{f"{name}_learning_rate": rate for name, rate in rates.items()},
        ),
        callbacks=[spy],
    )
    shares = [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    assert spy.rates == [pytest.approx({name: share * rate for name, rate in rates.items()}) for share in shares]
    logged = [{name: entry[f"learning_rate_{name}"] for name in rates} for entry in result.history if "loss" in entry]
    assert logged == spy.rates
    assert [group["name"] for group in spy.optimizer.param_groups] == list(rates)
    members = {group["name"]: {id(parameter) for parameter in group["params"]} for group in spy.optimizer.param_groups}
    groups = parameter_groups(result.model.aligner)
    assert members == {name: {id(parameter) for parameter in group.values()} for name, group in groups.items()}
    assert {name: set(group) for name, group in groups.items()} == {name: set(names) for name, names in GROUPS.items()}
    assert sum(len(group) for group in groups.values()) == len(list(result.model.aligner.parameters()))


def test_a_rate_of_zero_freezes_its_group(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    config = configuration(
        backbones, clips, tmp_path, steering_learning_rate=0, router_learning_rate=0, model={"steering_scale": 0}, max_steps=3
    )
    before, _ = build(config.model, seed=config.training.seed)
    spy = Spy()
    result = train(config, callbacks=[spy])
    changed = {
        name for name, value in result.model.aligner.state_dict().items() if not torch.equal(value, before.aligner.state_dict()[name])
    }
    assert changed == {"prompt_proj.weight", "prompt_proj.bias"}
    assert [group["name"] for group in spy.optimizer.param_groups] == ["projection"]
    assert all(len(gradients) == 2 for gradients in spy.gradients)
    assert "learning_rate_router" not in result.history[0]
    assert load_file(result.checkpoint / "model.safetensors").keys() == result.model.trained_parameters().keys()


def test_weight_decay_spares_biases_and_scales(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    spy = Spy()
    result = train(configuration(backbones, clips, tmp_path, weight_decay=0.1, max_steps=1), callbacks=[spy])
    decays = {id(parameter): group["weight_decay"] for group in spy.optimizer.param_groups for parameter in group["params"]}
    decayed = {name for name, parameter in result.model.aligner.named_parameters() if decays[id(parameter)] == 0.1}
    assert decayed == {"steering_vectors", "router.weight", "prompt_proj.weight"}


def test_accumulation_gives_the_gradients_of_one_large_batch(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    """Passes hold different numbers of tokens: a mean of their means would be another gradient."""
    spies = []
    for name, batch, passes in (("whole", 8, 1), ("parts", 2, 4)):
        spies.append(Spy())
        settings = {"batch_size": batch, "accumulation_steps": passes, "max_grad_norm": 0.0, "max_steps": 1}
        train(configuration(backbones, clips, tmp_path / name, **settings), callbacks=[spies[-1]])
    whole, parts = (spy.gradients[0] for spy in spies)
    for name, gradient in whole.items():
        assert torch.dist(gradient, parts[name]) < 1e-4 * gradient.norm(), name


def test_clipping_comes_before_the_step(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    norms = {}
    for limit in (0.0, 0.01):
        spy = Spy()
        result = train(
            configuration(backbones, clips, tmp_path / str(limit), max_grad_norm=limit, max_steps=1, logging_steps=1), callbacks=[spy]
        )
        norms[limit] = spy.norms[0]
        # What is logged is the norm before clipping.
        assert result.history[0]["grad_norm"] == pytest.approx(norms[0.0], rel=1e-4)
    assert norms[0.0] > 0.02 and norms[0.01] == pytest.approx(0.01, rel=1e-3)


def test_router_losses_are_added_with_their_weights(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    settings = {"batch_size": 8, "max_steps": 1, "logging_steps": 1}
    plain = train(configuration(backbones, clips, tmp_path / "plain", **settings)).history[0]
    weighted = train(configuration(backbones, clips, tmp_path / "both", load_balancing_weight=0.5, z_loss_weight=0.25, **settings)).history[
        0
    ]
    assert weighted["loss"] == pytest.approx(plain["loss"] + 0.5 * weighted["load_balancing_loss"] + 0.25 * weighted["z_loss"], rel=1e-5)
    assert weighted["load_balancing_loss"] >= 1.0 and weighted["z_loss"] > 0 and "z_loss" not in plain
    # In parts: as much of it, however many passes a step has.
    parts = train(
        configuration(
            backbones,
            clips,
            tmp_path / "parts",
            load_balancing_weight=0.5,
            z_loss_weight=0.25,
            **(settings | {"batch_size": 2, "accumulation_steps": 4}),
        )
    ).history[0]
    assert parts["loss"] == pytest.approx(weighted["loss"], rel=0.05)


def test_router_losses_are_those_of_the_reference_over_valid_frames(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    config = configuration(backbones, clips, tmp_path, batch_size=8, max_steps=1, logging_steps=1, z_loss_weight=1.0)
    logged = train(config).history[0]
    model, processor = build(config.model, seed=config.training.seed)
    batch, _ = _whole_batch(config, processor)
    with torch.no_grad():
        output = model(**batch, output_gates=True)
    aligner, mask = model.aligner, output.frame_mask
    assert int(mask.sum()) < mask.numel(), "the batch must hold padding"
    streams = _streams(model, batch)
    experts = aligner.num_experts
    total = 0.0
    for layer, u in streams.items():
        rows = slice(layer * experts, (layer + 1) * experts)
        logits = u[mask] @ aligner.router.weight[rows].T + aligner.router.bias[rows]
        gates = reference.route(logits, None, True)
        assert torch.allclose(gates, output.gates[layer][mask], atol=1e-5)
        total += float(logits.detach().logsumexp(-1).square().mean()) / len(streams)
    assert logged["z_loss"] == pytest.approx(total, rel=1e-4)


def _whole_batch(config: Any, processor: Any) -> tuple[Any, Any]:
    from steermoe.data import Collator, load

    rows = load(config.data.train)
    lengths = rows.durations()
    order = sorted(range(len(rows)), key=lambda index: -lengths[index])
    return Collator(processor)([rows[index] for index in order]), rows


def _streams(model: Any, batch: Any) -> dict[int, torch.Tensor]:
    """What each layer's router reads: its output less what steering added, ``u = y - s (g V)``."""
    layers = [module for module in model.encoder.modules() if hasattr(module, "_place")]
    assert len(layers) == describe_encoder(model.encoder).num_layers
    outputs: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            outputs[index] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    hooks = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    with torch.no_grad():
        gates = model(**batch, output_gates=True).gates
    for hook in hooks:
        hook.remove()
    aligner = model.aligner
    with torch.no_grad():
        return {index: y - aligner.layer_scales[index] * (gates[index] @ aligner.steering_vectors[index]) for index, y in outputs.items()}


def test_what_a_run_leaves_behind(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    config = configuration(
        backbones,
        clips,
        tmp_path,
        eval=clips,
        max_steps=6,
        eval_steps=3,
        save_steps=2,
        save_total_limit=1,
        tensorboard=True,
        logging_steps=2,
    )
    result = train(config)
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert {result.checkpoint.name, "checkpoint-6"} == set(checkpoints) and result.last_checkpoint.name == "checkpoint-6"
    scores = {entry["step"]: entry["eval_wer"] for entry in result.history if "eval_wer" in entry}
    assert list(scores) == [3, 6] and result.metric == "wer" and result.best_score == min(scores.values())
    assert result.checkpoint.name == f"checkpoint-{min(scores, key=lambda step: (scores[step], step))}"
    assert result.evaluation is not None and len(result.evaluation.hypotheses) == 8
    best = load_file(result.checkpoint / "model.safetensors")
    assert all(torch.equal(best[name], parameter) for name, parameter in result.model.trained_parameters().items())
    # The trained weights alone, the optimizer's two moments of them, and small things.
    trained = 4 * sum(parameter.numel() for parameter in result.model.trained_parameters().values())
    assert sum(path.stat().st_size for path in result.checkpoint.rglob("*")) < 3 * trained + 100_000
    from steermoe.model import SteerMoEForConditionalGeneration
    from steermoe.processor import SteerMoEProcessor

    again = SteerMoEForConditionalGeneration.from_pretrained(result.checkpoint)
    assert all(torch.equal(best[name], parameter) for name, parameter in again.trained_parameters().items())
    assert SteerMoEProcessor.from_pretrained(result.checkpoint).sampling_rate == 16000
    statistics = read_statistics(tmp_path / STATISTICS_NAME)
    assert [step for step, _ in statistics] == [2, 4, 6]
    assert torch.allclose(statistics[-1][1].load.sum(-1), torch.ones(3, dtype=torch.float64), atol=1e-4)
    assert list(tmp_path.rglob("events.out.tfevents*"))
    entry = next(entry for entry in result.history if "loss" in entry)
    assert {"router_entropy", "router_max_load", "layer_scale_mean", "grad_norm", "learning_rate_steering"} <= entry.keys()


def test_tensorboard_has_every_expert_and_layer(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(configuration(backbones, clips, tmp_path, max_steps=2, tensorboard=True))
    events = EventAccumulator(str(next(tmp_path.rglob("events.out.tfevents*")).parent)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"router_load/layer_{layer:02d}/expert_{expert}" for layer in range(3) for expert in range(4)} <= tags
    assert {"router_entropy/layer_02", "layer_scale/layer_00", "train/loss", "train/learning_rate_router"} <= tags


def test_early_stopping(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    # Rates so small that no hypothesis changes: the first evaluation stays the best one.
    rates = {f"{name}_learning_rate": 1e-12 for name in GROUPS}
    result = train(configuration(backbones, clips, tmp_path, eval=clips, max_steps=20, eval_steps=1, early_stopping_patience=2, **rates))
    assert result.steps == 3 and result.checkpoint.name == "checkpoint-1" and not result.interrupted
    verify(result.last_checkpoint)
    again = train(tmp_path / TRAINING_CONFIG_NAME, resume=True)  # it is over, and stays so
    assert again.steps == 3 and again.checkpoint == result.checkpoint


def test_bad_rows_are_counted_named_and_limited(
    backbones: Backbones, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    manifest = corpus(folder, clips=6)
    (folder / "2.wav").write_bytes(b"no audio at all")
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[4]["text"] = ""
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = configuration(backbones, manifest, tmp_path / "run", max_steps=4)
    result = train(config)
    assert result.steps == 4 and len(result.bad_rows) == 2
    named = " ".join(str(problem) for problem in result.bad_rows)
    assert "2.wav" in named and "no text to learn" in named
    said = capsys.readouterr().err
    assert "2 rows were left out" in said and "2.wav" in said
    config.data.max_bad_rows, config.training.output_dir = 1, str(tmp_path / "other")
    with pytest.raises(TooManyBadRows, match="allow"):
        train(config)


def test_a_loss_that_is_no_number_stops_the_run(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    config = configuration(backbones, clips, tmp_path, max_steps=4, save_steps=1, logging_steps=4)
    model, processor = build(config.model)
    with torch.no_grad():
        model.aligner.prompt_proj.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 4: lower the learning rates .* there is no earlier checkpoint"):
        train(config, model=model, processor=processor)
    assert not list(tmp_path.glob("checkpoint-*")), "weights that are no numbers must not be saved"


def test_bfloat16_by_autocast_trains_float32_weights(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    result = train(configuration(backbones, clips, tmp_path, max_steps=10, batch_size=8, bf16=True))
    assert {parameter.dtype for parameter in result.model.trained_parameters().values()} == {torch.float32}
    assert result.losses[-1][1] < result.losses[0][1]
    half = train(configuration(backbones, clips, tmp_path / "half", max_steps=10, batch_size=8, model={"dtype": "bfloat16"}))
    assert {parameter.dtype for parameter in half.model.trained_parameters().values()} == {torch.float32}
    assert half.losses[-1][1] < half.losses[0][1]


def test_workers_change_nothing(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    config = configuration(backbones, clips, tmp_path / "none", max_steps=3)
    alone = train(config)
    config.data.num_workers, config.training.output_dir = 1, str(tmp_path / "one")
    assert curve(train(config).history) == curve(alone.history)


def test_what_cannot_be_trained_is_said(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    config = configuration(backbones, clips, tmp_path / "run", max_steps=1)
    train(config)
    with pytest.raises(FileExistsError, match=r"holds checkpoint-1 of an earlier run: resume that, or choose another folder"):
        train(config)
    with pytest.raises(ValueError, match="model and processor must be given together"):
        train(config, model=object())
    config = configuration(backbones, tmp_path / "nowhere.jsonl", tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        train(config)


def test_scores_follow_language_and_task(backbones: Backbones, clips: Path, tmp_path: Path) -> None:
    config = configuration(backbones, clips, tmp_path)
    assert score_of(config, None) == ("wer", False)
    config.data.language = "zh"
    assert score_of(config, None) == ("cer", False)
    config.data.task = "question"
    assert score_of(config, None) == ("accuracy", True)
    assert training_arguments(config, 100, "accuracy", True).eval_steps == 100
    config.training.eval_steps = None
    assert training_arguments(config, 101, "accuracy", True).eval_steps == 51, "once an epoch"
