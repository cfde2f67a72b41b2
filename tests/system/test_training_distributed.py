"""Two processes over gloo give one process's gradients, log and score, also where one has more tokens than the other."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from training_runs import Spy, configuration, corpus

from steermoe.run_checkpoints import CheckpointError, verify
from steermoe.saved_model import WEIGHTS_NAME
from steermoe.training import TrainingResult, train
from steermoe.training_config import TrainingConfig

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")

RANKS, STEPS = 2, 3
# Texts of very different lengths: a mean of the processes' means would weigh tokens unequally.
TEXTS = ("a", "two", "three four five six seven", "no", "eight nine ten eleven twelve", "yes", "b", "seven eight")


def _rank(rank: int, port: int, config: dict[str, Any], folder: str, resume: bool) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    spy = Spy()
    result = train(TrainingConfig.from_dict(config), callbacks=[spy], resume=resume)
    scores = _scores(result) if result.evaluation else {}
    saved = {"gradients": spy.gradients, "history": result.history, "scores": scores, "bad_rows": len(result.bad_rows)}
    torch.save(saved, f"{folder}/rank-{rank}.pt")
    dist.barrier()
    os._exit(0)  # torch 2.13 aborts now and then when gloo is torn down after DDP


def _scores(result: TrainingResult) -> dict[str, Any]:
    """What does not depend on the clock."""
    evaluation: Any = result.evaluation
    hypotheses = [(row.place, row.id, row.hypothesis) for row in evaluation.hypotheses]
    return {
        "rows": evaluation.rows,
        "hypotheses": hypotheses,
        "problems": [*map(str, evaluation.problems)],
        "wer": evaluation.errors.to_dict(),
    }


def _spawn(config: TrainingConfig, folder: Path, resume: bool = False) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (port, config.to_dict(), os.fspath(folder), resume), nprocs=RANKS)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def runs(
    tiny_encoder: Path, tiny_language_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], Spy, TrainingResult, TrainingConfig]:
    """The two ranks' records, and one process on the same batches. Every clip is met in each epoch, of which the last step is whole."""
    folder = tmp_path_factory.mktemp("runs")
    clips = corpus(folder / "clips", 8, texts=TEXTS)
    # A row of each kind that cannot be scored: no JSON, no text, no audio.
    lines = clips.read_text().splitlines()
    (folder / "clips" / "none.wav").write_bytes(b"no audio at all")
    bad = (lines[0][:-1], json.dumps({"audio_filepath": "1.wav"}), json.dumps({"audio_filepath": "none.wav", "text": "gone"}))
    held_out = clips.with_name("held-out.jsonl")
    held_out.write_text("\n".join([lines[0], *bad, *lines[1:]]))
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "logging_steps": 1,
        "eval_steps": STEPS,
        "load_balancing_weight": 0.0,
        "schedule": "constant",
        "warmup_steps": 0,
        "save_steps": 1,
        "save_total_limit": STEPS,
    }
    two = configuration((tiny_encoder, tiny_language_model), clips, folder / "two", eval=held_out, batch_size=2, **settings)
    one = configuration((tiny_encoder, tiny_language_model), clips, folder / "one", eval=held_out, batch_size=4, **settings)
    ranks = _spawn(two, folder)
    spy = Spy()
    return ranks, spy, train(one, callbacks=[spy]), two


def test_gradients_of_two_processes_are_those_of_one(runs: Any) -> None:
    ranks, spy, _, _ = runs
    assert len(spy.gradients) == STEPS
    for step, expected in enumerate(spy.gradients):
        first, second = (rank["gradients"][step] for rank in ranks)
        for name, gradient in expected.items():
            assert torch.equal(first[name], second[name]), "the processes do not agree"
            # Later steps start from weights that AdamW has taken apart by as little as its first gradients differed.
            assert torch.dist(first[name], gradient) < (1e-5 if step == 0 else 1e-3) * gradient.norm(), (step, name)


def test_logs_and_scores_are_of_the_whole(runs: Any) -> None:
    ranks, _, result, _ = runs
    for step, (logged, expected) in enumerate(zip(ranks[0]["history"], result.history, strict=False)):
        for key in ("loss", "grad_norm", "router_entropy", "router_max_load", "learning_rate_router", "eval_wer", "eval_bad_rows"):
            assert (key in logged) == (key in expected)
            if key in expected:
                assert logged[key] == pytest.approx(expected[key], rel=1e-4), (step, key)
    assert ranks[0]["scores"] == ranks[1]["scores"], "every process has every hypothesis"
    assert ranks[0]["scores"] == _scores(result)
    assert len(result.evaluation.hypotheses) == 8 and len(result.evaluation.problems) == 3 and result.evaluation.rows == 11


def test_a_checkpoint_of_two_processes_is_whole_and_not_for_one(runs: Any) -> None:
    *_, config = runs
    checkpoint = Path(config.training.output_dir) / f"checkpoint-{STEPS}"
    verify(checkpoint)
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "model.safetensors"} <= {path.name for path in checkpoint.iterdir()}
    with pytest.raises(CheckpointError, match="was made by 2 processes, and this run has 1: start as many"):
        train(config, resume=True)


def test_two_processes_go_on_where_they_were_stopped(runs: Any, tmp_path: Path) -> None:
    """In the middle of an epoch: the same batches, losses and weights as without the stop."""
    ranks, _, _, config = runs
    whole = Path(config.training.output_dir)
    stopped = dataclasses.replace(config, training=dataclasses.replace(config.training, output_dir=str(tmp_path / "stopped")))
    shutil.copytree(whole, tmp_path / "stopped")
    for step in range(2, STEPS + 1):  # an epoch has two steps: the first one's checkpoint is in the middle of it
        shutil.rmtree(tmp_path / "stopped" / f"checkpoint-{step}")
    resumed = _spawn(stopped, tmp_path, resume=True)
    for rank, before in zip(resumed, ranks, strict=True):
        assert len(rank["gradients"]) == STEPS - 1
        for step, gradients in enumerate(before["gradients"][1:]):
            for name, gradient in gradients.items():
                assert torch.equal(rank["gradients"][step][name], gradient), (step + 2, name)
    last = load_file(tmp_path / "stopped" / f"checkpoint-{STEPS}" / WEIGHTS_NAME)
    for name, weights in load_file(whole / f"checkpoint-{STEPS}" / WEIGHTS_NAME).items():
        assert torch.equal(last[name], weights), name
