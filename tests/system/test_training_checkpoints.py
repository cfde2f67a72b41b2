"""Checkpoint folders appear whole or not at all, and what is wrong with one is named."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from tiny_models import build

from steermoe import saved_model
from steermoe.run_checkpoints import (
    SEAL,
    CheckpointError,
    checkpoints_in,
    newest_sound,
    remove_old,
    remove_unfinished,
    seal,
    staging_folder,
    step_of,
    verify,
)


def save(run: Path, step: int, content: str = "weights") -> Path:
    checkpoint = run / f"checkpoint-{step}"
    staging = staging_folder(checkpoint)
    (staging / "inner").mkdir(parents=True)
    (staging / "model.safetensors").write_text(content * 100)
    (staging / "inner" / "state.json").write_text("{}")
    seal(checkpoint)
    return checkpoint


def test_steps_are_ordered_by_number(tmp_path: Path) -> None:
    assert checkpoints_in(tmp_path / "nowhere") == []
    for step in (1000, 20, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-1000"]
    assert newest_sound(tmp_path) == (tmp_path / "checkpoint-1000", [])
    with pytest.raises(ValueError, match="a folder called checkpoint-STEP"):
        step_of(tmp_path / "checkpoint-x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path / "model.safetensors", 300), r"model\.safetensors has 300 bytes, and 700 were written"),
        (lambda path: (path / "model.safetensors").write_text("WEIGHTS" * 100), r"model\.safetensors is damaged"),
        (lambda path: (path / "inner" / "state.json").unlink(), r"inner/state\.json is missing"),
        (lambda path: (path / SEAL).unlink(), "was never finished: it has no checkpoint.json"),
        (lambda path: os.truncate(path / SEAL, 20), r"checkpoint\.json is damaged"),
    ],
)
def test_damage_is_named_and_passed_over(tmp_path: Path, damage: object, message: str) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    verify(newer)
    damage(newer)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        verify(newer)
    found, problems = newest_sound(tmp_path)
    assert found == older and len(problems) == 1 and "checkpoint-2" in str(problems[0])
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        verify(tmp_path / "checkpoint-3")


def test_a_step_saved_again_replaces_itself(tmp_path: Path) -> None:
    save(tmp_path, 5, "first")
    save(tmp_path, 5, "other")
    verify(tmp_path / "checkpoint-5")
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_text().startswith("other")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_failing_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    save(tmp_path, 5, "first")
    real = getattr(os, call)

    def fail(*arguments: object) -> object:
        if call == "fsync" or "unfinished" in str(arguments[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 5, "other")
    monkeypatch.undo()
    verify(tmp_path / "checkpoint-5")
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_text().startswith("first")
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_process_killed_while_the_model_is_saved_leaves_nothing_for_good(
    tiny_encoder: Path, tiny_language_model: Path, tmp_path: Path
) -> None:
    """Its model has a staging folder of its own beside the checkpoint's."""
    save(tmp_path, 5)
    (tmp_path / ".notes").mkdir()
    model, _ = build(tiny_encoder, tiny_language_model)
    if (child := os.fork()) == 0:
        saved_model.model_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,return-value]
        model.save_pretrained(staging_folder(tmp_path / "checkpoint-9"))
    os.waitpid(child, 0)
    assert any(path.name.startswith(".unfinished-checkpoint-9.unfinished-") for path in tmp_path.iterdir())
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes", "checkpoint-5"]


def test_a_replacement_cut_off_between_its_renames_is_put_back(tmp_path: Path) -> None:
    save(tmp_path, 5, "first")
    os.rename(tmp_path / "checkpoint-5", tmp_path / "replaced-checkpoint-5")
    remove_unfinished(tmp_path)
    verify(tmp_path / "checkpoint-5")


def test_old_ones_go_and_the_best_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    remove_old(tmp_path, None, ())
    assert len(checkpoints_in(tmp_path)) == 4
    remove_old(tmp_path, 2, (1, None))
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    remove_old(tmp_path, 1, (4,))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4"]
