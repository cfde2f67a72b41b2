"""The model: batches against single chats for every architecture, masks, the loss in chunks, what is frozen, and what is refused."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_backbones import ENCODERS, LANGUAGE_MODELS, noise
from tiny_models import ALL_CLIPS, ANSWERS, CLIPS, GREEDY, MIXED, build, user
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steermoe import FrameCounts, SteerMoEConfig, SteerMoEForConditionalGeneration, SteerMoEProcessor
from steermoe.label_loss import chunked_cross_entropy
from steermoe.loading import cast
from steermoe.preservation import verify

Folder = Callable[[str], Path]
Model = tuple[Any, Any]


@pytest.fixture(scope="module")
def made(tiny_encoder: Path, tiny_language_model: Path) -> Model:
    return build(tiny_encoder, tiny_language_model)


def check_batch_equals_single(model: Any, processor: Any) -> None:
    together = processor(MIXED, ALL_CLIPS)
    assert not together["attention_mask"].all(), "the batch must have padding"
    logits = model(**together).logits[:, -1]
    tokens = model.generate(**together, **GREEDY)
    for index, (chat, clips) in enumerate(zip(MIXED, CLIPS, strict=True)):
        alone = processor(chat, clips)
        torch.testing.assert_close(model(**alone).logits[0, -1], logits[index], rtol=1e-4, atol=1e-4)
        own = model.generate(**alone, **GREEDY)[0]
        assert torch.equal(tokens[index, : len(own)], own)
    # What is heard matters: other audio, other logits.
    other = processor(MIXED, [0.5 * clip[::-1].copy() for clip in ALL_CLIPS])
    moved = (model(**other).logits[:, -1] - logits).abs().amax(-1)
    assert (moved > 1e-2).tolist() == [True, False, True, True]


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_batch_equals_single_in_every_language_model(kind: str, tiny_encoder: Path, language_model_folder: Folder) -> None:
    check_batch_equals_single(*build(tiny_encoder, language_model_folder(kind)))


@pytest.mark.parametrize("kind", ENCODERS)
def test_batch_equals_single_in_every_encoder(kind: str, encoder_folder: Folder, tiny_language_model: Path) -> None:
    check_batch_equals_single(*build(encoder_folder(kind), tiny_language_model))


@pytest.mark.parametrize(
    "config",
    [
        {"audio_padding": "max_length"},
        {"pool": None, "pool_size": 1},
        {"pool": "mean", "pool_size": 3},
        {"pool_size": 7, "top_k": 2},
        {"pool_size": 1000, "top_k": 1, "renormalize": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_batch_equals_single_under_every_setting(attention: str, config: Any, tiny_encoder: Path, tiny_language_model: Path) -> None:
    model, processor = build(tiny_encoder, tiny_language_model, attn_implementation=attention, **config)
    assert model.encoder.config._attn_implementation == attention
    check_batch_equals_single(model, processor)


def test_openai_whisper(tiny_language_model: Path) -> None:
    whisper = pytest.importorskip("whisper.model")
    torch.manual_seed(0)
    encoder = whisper.Whisper(whisper.ModelDimensions(16, 100, 32, 4, 2, 40, 8, 32, 4, 1))
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    processor = SteerMoEProcessor.from_backbones(encoder.encoder, tiny_language_model, feature_extractor=extractor)
    model = SteerMoEForConditionalGeneration.from_backbones(encoder, tiny_language_model, num_experts=4, steering_scale=1.0)
    with torch.no_grad():
        model.aligner.steering_vectors.normal_()
        model.aligner.prompt_proj.weight.normal_()
    check_batch_equals_single(model, processor)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_reaches_nobody(side: str, made: Model) -> None:
    """Any features past a clip's end and any tokens where the mask is 0 leave everything as it is."""
    model, processor = made
    batch = processor(MIXED, ALL_CLIPS, answers=ANSWERS if side == "right" else None)
    batch.pop("labels", None)
    logits = model(**batch).logits
    spoilt = {key: value.clone() for key, value in batch.items()}
    for row, length in zip(spoilt["input_features"], spoilt["feature_lengths"].tolist(), strict=True):
        row[:, length:] = 1e4
    spoilt["input_ids"][spoilt["attention_mask"] == 0] = 77
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**spoilt).logits[real], logits[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3", "llama"])
def test_soft_frames_enter_the_first_layer_as_they_are(kind: str, tiny_encoder: Path, language_model_folder: Folder) -> None:
    """Gemma scales token embeddings where it looks them up. The projected frames must not be scaled, and the tokens must."""
    model, processor = build(tiny_encoder, language_model_folder(kind))
    batch = processor(user("<|audio|>Hm"), CLIPS[0])
    seen: list[Tensor] = []
    first = model.language_model.model.layers[0]
    hook = first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0]), with_kwargs=True
    )
    model(**batch)
    hook.remove()
    places = batch["input_ids"][0] == model.config.audio_token_id
    soft, counts, _, _ = model.encode(batch["input_features"], batch["feature_lengths"])
    torch.testing.assert_close(seen[0][0][places], soft[0, : counts[0]])
    tokens = batch["input_ids"][0][~places]
    model.language_model(input_ids=tokens[None])
    plain = model.language_model.get_input_embeddings()(tokens)
    torch.testing.assert_close(seen[0][0][~places], plain)
    scale = 32**0.5 if "gemma" in kind else 1.0
    torch.testing.assert_close(plain, scale * model.language_model.get_input_embeddings().weight[tokens], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_loss_is_the_library_s_own(kind: str, tiny_encoder: Path, language_model_folder: Folder) -> None:
    """Value and gradients of the chunked loss against cross entropy over the full logits, averaged and by a count."""
    model, processor = build(tiny_encoder, language_model_folder(kind))
    batch = processor(MIXED, ALL_CLIPS, answers=ANSWERS)
    labels = batch["labels"]
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    count = int((labels[:, 1:] != -100).sum())
    (total / count).backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.trained_parameters().items()}
    for given, divisor in ((None, count), (7, 7), (torch.tensor(13), 13)):
        model.zero_grad()
        output = model(**batch, num_items_in_batch=given)
        assert output.logits is None and output.loss.dtype == torch.float32
        torch.testing.assert_close(output.loss, total.detach() / divisor)
        output.loss.backward()
        for name, parameter in model.trained_parameters().items():
            torch.testing.assert_close(parameter.grad, wanted[name] * count / divisor, rtol=1e-4, atol=1e-6)


def test_a_head_of_another_kind_is_noticed(tiny_encoder: Path, tiny_language_model: Path) -> None:
    """A language model that does more to its logits than is known here: its own forward gives them then."""
    model, processor = build(tiny_encoder, tiny_language_model)
    plain = model.language_model.forward

    def odd(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits.sin()
        return output

    model.language_model.forward = odd
    batch = processor(MIXED, ALL_CLIPS, answers=ANSWERS)
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(model(**batch).loss, wanted)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_full_logits_never_exist() -> None:
    """No tensor larger than a chunk, forward or backward, and exact gradients; whole logits would be 32 times that."""
    tokens, width, vocabulary, chunk = 256, 16, 4096, 8 * 4096
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    with LargestTensor() as largest:
        loss = chunked_cross_entropy(hidden, targets, lambda part: part @ weight.T, vocabulary, chunk_elements=chunk)
        loss.backward()
    assert largest.elements <= max(chunk, weight.numel())
    gradient, hidden.grad = hidden.grad, None
    whole = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    whole.backward()
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(gradient, hidden.grad)
    with LargestTensor() as largest:
        F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert largest.elements == tokens * vocabulary


@pytest.mark.parametrize("labelled", [0, 1])
def test_a_batch_with_few_labels_or_none(labelled: int, made: Model) -> None:
    model, processor = made
    batch = processor(MIXED, ALL_CLIPS, answers=ANSWERS)
    batch["labels"][:] = -100
    batch["labels"][0, 30] = 5 if labelled else -100
    loss = model(**batch).loss
    assert loss.isfinite() and (loss > 0) == bool(labelled)
    loss.backward()
    model.zero_grad()


def test_a_batch_of_text_alone_can_be_trained_on(made: Model) -> None:
    model, processor = made
    batch = processor([MIXED[1]], answers=["no"])
    assert "input_features" not in batch
    output = model(**batch, output_gates=True)
    output.loss.backward()
    assert output.gates is None and output.frame_mask is None
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.trained_parameters().values())
    model.zero_grad()


def test_text_alone_gives_the_language_model_s_own_logits(made: Model, tiny_language_model: Path) -> None:
    model, processor = made
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_language_model)
    batch = processor([MIXED[1]])
    assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_gates_and_frame_mask(made: Model) -> None:
    model, processor = made
    batch = processor(MIXED, ALL_CLIPS)
    output = model(**batch, output_gates=True)
    frames = model.frame_counts.frames(batch["feature_lengths"])
    assert output.frame_mask.shape == (4, int(frames.max())) and output.frame_mask.sum(-1).tolist() == frames.tolist()
    assert set(output.gates) == {0, 1, 2}
    for gates in output.gates.values():
        assert gates.shape == (*output.frame_mask.shape, 4) and gates.requires_grad
        torch.testing.assert_close(gates.sum(-1), torch.ones(gates.shape[:2]))
    assert model(**batch).gates is None


def test_gates_of_clips_encoded_one_length_at_a_time(encoder_folder: Folder, tiny_language_model: Path) -> None:
    model, processor = build(encoder_folder("conformer"), tiny_language_model)
    batch = processor(MIXED, ALL_CLIPS)
    together = model(**batch, output_gates=True)
    alone = model(**processor(user("<|audio|>"), [ALL_CLIPS[1]]), output_gates=True)
    for layer, gates in alone.gates.items():
        torch.testing.assert_close(together.gates[layer][1, together.frame_mask[1]], gates[0])


def test_frozen_means_frozen(tiny_encoder: Path, tiny_language_model: Path) -> None:
    model, processor = build(tiny_encoder, tiny_language_model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    assert model.training and not any(part.training for part in (*model.encoder.modules(), *model.language_model.modules()))
    trained = {id(parameter) for parameter in model.trained_parameters().values()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == trained
    batch = processor(MIXED, ALL_CLIPS, answers=ANSWERS)
    # The encoder's configured dropout of 0.1 would make these differ.
    assert torch.equal(model(**batch).loss, model(**batch).loss)
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=0.1)
    model(**batch).loss.backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in trained)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"encoder.steering.{name}" for name in model.trained_parameters()}


def test_nothing_is_kept_for_an_encoder_that_does_not_learn(made: Model) -> None:
    """With vectors, scales and router fixed, the frames have no graph behind them, and the projection alone has gradients."""
    model, processor = made
    model = copy.deepcopy(model)
    for name, parameter in model.trained_parameters().items():
        parameter.requires_grad_(name.startswith("prompt_proj"))
    seen: list[Tensor] = []
    model.encoder.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    model(**processor(MIXED, ALL_CLIPS, answers=ANSWERS)).loss.backward()
    assert not seen[0].requires_grad
    assert {name for name, parameter in model.trained_parameters().items() if parameter.grad is not None} == {
        "prompt_proj.weight",
        "prompt_proj.bias",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_backbones_under_a_float32_aligner(dtype: torch.dtype, tiny_encoder: Path, tiny_language_model: Path) -> None:
    exact, processor = build(tiny_encoder, tiny_language_model)
    model, _ = build(tiny_encoder, tiny_language_model, dtype=dtype)
    assert {parameter.dtype for parameter in model.trained_parameters().values()} == {torch.float32}
    assert model.encoder.conv1.weight.dtype == dtype == model.language_model.model.embed_tokens.weight.dtype
    # What is computed and not stored stays as exact as the library keeps it.
    assert model.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_language_model, dtype=dtype)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.language_model.state_dict().items())
    batch = processor(MIXED, ALL_CLIPS, answers=ANSWERS)
    output = model(**batch)
    torch.testing.assert_close(output.loss, exact(**batch).loss, rtol=0.05, atol=0.05)
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.trained_parameters().values())
    assert model.generate(**processor(MIXED, ALL_CLIPS), **GREEDY).shape[0] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("declared", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_what_a_model_keeps_in_float32_stays_in_float32(
    declared: str, dtype: torch.dtype, tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the library loads it: always, or in float16 only."""
    monkeypatch.setattr(transformers.Qwen2ForCausalLM, declared, ["mlp"])
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_language_model, dtype=dtype).state_dict()
    ours = transformers.AutoModelForCausalLM.from_pretrained(tiny_language_model, dtype=torch.float32)
    cast(ours, dtype)
    assert {name: tensor.dtype for name, tensor in ours.state_dict().items()} == {name: tensor.dtype for name, tensor in plain.items()}
    kept = declared.endswith("_strict") or dtype == torch.float16
    assert plain["model.layers.0.mlp.up_proj.weight"].dtype == (torch.float32 if kept else dtype)


def test_autocast(made: Model) -> None:
    model, processor = made
    batch = processor(MIXED, ALL_CLIPS, answers=ANSWERS)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.loss, model(**batch).loss, rtol=0.05, atol=0.05)
    model.zero_grad()


@pytest.mark.parametrize("kind", ["whisper", "w2v_bert"])
def test_copies_and_pickles(kind: str, encoder_folder: Folder, tiny_language_model: Path) -> None:
    model, processor = build(encoder_folder(kind), tiny_language_model)
    batch = processor(MIXED, ALL_CLIPS)
    logits = model(**batch).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch).logits, logits)
        with torch.no_grad():
            other.aligner.prompt_proj.weight.zero_()
        assert not torch.equal(other(**batch).logits, logits) and torch.equal(model(**batch).logits, logits)
        assert not any(parameter.requires_grad for parameter in other.language_model.parameters())


def test_a_cache_goes_on_from_the_prompt(made: Model) -> None:
    model, processor = made
    batch = processor(MIXED, ALL_CLIPS)
    first = model(**batch, use_cache=True)
    cache = first.get("past_key_values", first.get("cache"))
    token = first.logits[:, -1:].argmax(-1)
    mask = torch.cat([batch["attention_mask"], torch.ones(4, 1, dtype=torch.long)], 1)
    second = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
    assert torch.equal(model.generate(**batch, max_new_tokens=2, do_sample=False)[:, 1:], second.logits[:, -1:].argmax(-1))


def test_backbones_as_modules(tiny_encoder: Path, tiny_language_model: Path) -> None:
    by_path, processor = build(tiny_encoder, tiny_language_model)
    whisper = transformers.AutoModel.from_pretrained(tiny_encoder)
    language_model = transformers.AutoModelForCausalLM.from_pretrained(tiny_language_model)
    model = SteerMoEForConditionalGeneration.from_backbones(whisper, language_model, num_experts=4)
    assert model.language_model is language_model and model.encoder is whisper.encoder
    assert (model.config.audio_model, model.config.text_model) == (str(tiny_encoder), str(tiny_language_model))
    assert model.config.audio_fingerprint == by_path.config.audio_fingerprint
    assert model.config.audio_token_id == processor.audio_token_id
    language_model.name_or_path = language_model.config._name_or_path = ""
    with pytest.raises(ValueError, match="text_model is a module of no known origin: give audio_token_id"):
        SteerMoEForConditionalGeneration.from_backbones(tiny_encoder, language_model)


def test_inputs_that_do_not_fit_together(made: Model) -> None:
    model, processor = made
    batch = processor(MIXED, ALL_CLIPS)
    wanted = int((batch["input_ids"] == processor.audio_token_id).sum())
    with pytest.raises(ValueError, match=f"input_ids holds {wanted} audio tokens, and input_features is missing"):
        model(input_ids=batch["input_ids"])
    fewer = {**batch, "input_features": batch["input_features"][:3], "feature_lengths": batch["feature_lengths"][:3]}
    with pytest.raises(ValueError, match=rf"input_ids holds {wanted} audio tokens, and the clips give \d+ pooled frames"):
        model(**fewer)
    for lengths in (torch.tensor([8, 8]), torch.tensor([0, 8, 8, 8]), torch.tensor([8, 8, 8, 999])):
        with pytest.raises(ValueError, match="feature_lengths must be"):
            model(**{**batch, "feature_lengths": lengths})
    with pytest.raises(ValueError, match="labels must have input_ids' shape"):
        model(**batch, labels=torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(NotImplementedError, match="never resized"):
        model.resize_token_embeddings(300)


@pytest.mark.parametrize(
    "config, said",
    [
        ({"pool": "median"}, "pool must be 'max', 'mean' or None, got 'median'"),
        ({"pool_size": 0}, "pool_size must be a whole number of at least 1, got 0"),
        ({"pool_size": 2.0}, "pool_size must be a whole number"),
        ({"pool": None, "pool_size": 4}, "pool None pools nothing, and pool_size must be 1 then, got 4"),
        ({"audio_padding": "left"}, "audio_padding must be 'longest' or 'max_length', got 'left'"),
        ({"top_k": 9}, "top_k must be between 1 and num_experts"),
        ({"backend": "abacus"}, "abacus"),
    ],
)
def test_settings_that_are_refused(config: dict[str, Any], said: str, tiny_encoder: Path, tiny_language_model: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match=said):
        SteerMoEForConditionalGeneration.from_backbones(tiny_encoder, tiny_language_model, **config)


def test_config_survives_a_round_trip() -> None:
    config = SteerMoEConfig(audio_model="a/b", text_model="c/d", num_experts=3, top_k=2, pool="mean", pool_size=5, audio_token_id=9)
    again = SteerMoEConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict() and (again.pool, again.pool_size, again.top_k) == ("mean", 5, 2)


def test_a_field_that_is_nearly_one_is_refused() -> None:
    with pytest.raises(TypeError, match=r"SteerMoEConfig has no field 'num_expert' \(did you mean 'num_experts'\?\)"):
        SteerMoEConfig(num_expert=4)
    assert SteerMoEConfig(my_note="kept").my_note == "kept"


@pytest.mark.parametrize("kind", ENCODERS)
def test_frame_counts(kind: str, encoder_folder: Folder) -> None:
    """The arithmetic against what the encoder really puts out."""
    model = transformers.AutoModel.from_pretrained(encoder_folder(kind))
    counts = FrameCounts.of(model.config)
    assert FrameCounts.from_dict(counts.to_dict()) == counts
    lengths = [200] if counts.layout == "mel" else [counts.shortest, counts.shortest + 1, 1234, 1919, 1920, 1921]
    for length in lengths:
        if counts.layout == "mel":
            out = model.encoder(torch.zeros(1, 16, length))[0]
        elif counts.layout == "waveform":
            out = model(torch.randn(1, length))[0]
        else:
            out = model(torch.randn(1, length, 32))[0]
        assert out.shape[1] == counts.frames(length) == int(counts.frames(torch.tensor(length)))
    assert counts.frames(counts.shortest) == 1
    assert counts.whole_windows(counts.shortest, 4) >= counts.shortest


def test_whole_windows() -> None:
    counts = FrameCounts.of(transformers.WhisperConfig(max_source_positions=100))
    assert [counts.whole_windows(n, 4) for n in (1, 8, 9, 199, 200)] == [8, 8, 16, 200, 200]
    assert [counts.whole_windows(n, 7) for n in (1, 195, 197, 200)] == [14, 196, 200, 200]  # as far as the longest input allows
    assert [counts.pooled(n, 7) for n in (14, 196, 200)] == [1, 14, 15]
    with pytest.raises(ValueError, match="number of frames that a bert encoder puts out is not known; known are whisper"):
        FrameCounts.of(transformers.BertConfig())
    with pytest.raises(ValueError, match="add_adapter=False"):
        FrameCounts.of(transformers.Wav2Vec2Config(add_adapter=True))


def test_an_encoder_of_another_family_comes_with_its_frame_counts(tmp_path: Path, tiny_language_model: Path) -> None:
    """Through saving, loading and the proof of the backbones: nothing in the package names Moonshine."""
    moonshine = pytest.importorskip("transformers.models.moonshine")
    torch.manual_seed(0)
    sizes = {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 1, "encoder_num_attention_heads": 2}
    sizes |= {"decoder_num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 40}
    config = moonshine.MoonshineConfig(**sizes, initializer_range=0.2, pad_token_id=0)
    moonshine.MoonshineModel(config).save_pretrained(tmp_path / "moonshine")
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path / "moonshine")
    backbones = (tmp_path / "moonshine", tiny_language_model)
    for kind in (SteerMoEForConditionalGeneration, SteerMoEProcessor):
        with pytest.raises(ValueError, match=r"a moonshine encoder puts out is not known.*: give frame_counts, a steermoe\.Frame"):
            kind.from_backbones(*backbones)  # type: ignore[attr-defined]
    counts = FrameCounts("waveform", (127, 7, 3), (64, 3, 2))
    processor = SteerMoEProcessor.from_backbones(*backbones, frame_counts=counts)
    model = SteerMoEForConditionalGeneration.from_backbones(*backbones, num_experts=4, steering_scale=1.0, frame_counts=counts)
    with torch.no_grad():
        model.aligner.steering_vectors.normal_()
        model.aligner.prompt_proj.weight.normal_()
    check_batch_equals_single(model, processor)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    again = SteerMoEForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    batch = SteerMoEProcessor.from_pretrained(tmp_path / "saved")(MIXED, ALL_CLIPS)
    assert again.frame_counts == counts and torch.equal(again(**batch).logits, model(**batch).logits)
    result = verify(tmp_path / "saved")
    assert result.passed, result.report()
    wrong = FrameCounts("waveform", (127, 7, 3), (64, 3, 1)).to_dict()
    model = SteerMoEForConditionalGeneration.from_backbones(*backbones, frame_counts=wrong)
    with pytest.raises(ValueError, match=r"frame_counts give \d+ pooled frames for \d+ feature frames, and the encoder puts out \d+"):
        model(**processor(MIXED, ALL_CLIPS))


@pytest.mark.parametrize(
    "counts, said",
    [
        ({"layout": "spectrum"}, "layout must be one of mel, waveform, filterbank, got 'spectrum'"),
        ({"layout": "mel", "kernels": [3, 3], "strides": [1]}, "strides must hold a whole number of at least 1 for each of 2 kernels"),
        ({"layout": "mel", "kernels": [0], "strides": [1]}, "kernels must hold"),
        ({"kernels": [3]}, "layout"),
        ({"layout": "mel", "hop": 3}, "hop"),
        ("mel", "frame_counts must be FrameCounts, or a mapping of their fields, got 'mel'"),
    ],
)
def test_frame_counts_that_cannot_be(counts: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SteerMoEConfig(frame_counts=counts)


def test_full_features_need_no_lengths(made: Model) -> None:
    model, processor = made
    batch = processor(user("<|audio|>x"), [noise(0.64)])
    lengths = batch.pop("feature_lengths")
    assert torch.equal(model(**batch).logits, model(**batch, feature_lengths=lengths).logits)


def test_without_its_dependencies_the_import_says_what_to_install() -> None:
    hidden = "import sys; sys.modules['transformers'] = None; import steermoe"
    run = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.rstrip().endswith("pip install 'steermoe-kernels[system]'"), run.stderr
    for library in ("transformers", "typer"):
        hidden = f"import sys; sys.modules['{library}'] = None; import steermoe_console; steermoe_console.main()"
        run = subprocess.run([sys.executable, "-c", hidden, "inspect", "nowhere"], capture_output=True, text=True)
        assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
        assert run.stderr.rstrip().endswith("pip install 'steermoe-kernels[system]'"), run.stderr
