"""A run that was stopped goes on as if it had not been, bit for bit; and nothing that goes wrong takes an earlier checkpoint along."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import configuration, corpus, curve
from transformers import TrainerCallback

from steermoe.run_checkpoints import CheckpointError, checkpoints_in, locked, seal, staging_folder, verify
from steermoe.saved_model import WEIGHTS_NAME
from steermoe.statistics import STATISTICS_NAME
from steermoe.trainer import ROWS_NAME, AlignerTrainer
from steermoe.training import TrainingResult, build, train
from steermoe.training_config import TRAINING_CONFIG_NAME, TrainingConfig

# Seven clips by two: the epochs' last batch is short, and an accumulated step may have fewer passes.
CLIPS = 7
SETTINGS: dict[str, Any] = {
    "max_steps": 12,
    "logging_steps": 3,
    "eval_steps": 5,
    "save_steps": 4,
    "save_total_limit": None,
    "load_balancing_weight": 0.01,
    "z_loss_weight": 0.01,
}


KILL = "import os, sys; [os.kill(int(process), int(sys.argv[1])) for process in sys.argv[2:]]"


class Signal(TrainerCallback):
    """Sends this process a signal while step ``at`` runs, as Ctrl-C in a terminal does."""

    def __init__(self, at: int, number: int = signal.SIGINT) -> None:
        self.at, self.number = at, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.at:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def backbones(tiny_encoder: Path, tiny_language_model: Path) -> tuple[Path, Path]:
    return tiny_encoder, tiny_language_model


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus(tmp_path_factory.mktemp("clips"), CLIPS)


@pytest.fixture(scope="module")
def whole(backbones: tuple[Path, Path], clips: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, TrainingResult]:
    """Uninterrupted runs, by accumulation."""
    return {
        passes: train(configuration(backbones, clips, tmp_path_factory.mktemp("whole"), eval=clips, accumulation_steps=passes, **SETTINGS))
        for passes in (1, 2)
    }


def _assert_same_run(resumed: TrainingResult, whole: TrainingResult) -> None:
    assert curve(resumed.history) == curve(whole.history)
    assert resumed.best_score == whole.best_score and resumed.checkpoint.name == whole.checkpoint.name
    first, second = (load_file(result.last_checkpoint / "model.safetensors") for result in (resumed, whole))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    logs = [(result.last_checkpoint.parent / STATISTICS_NAME).read_text() for result in (resumed, whole)]
    assert logs[0] == logs[1]


# Within a logging interval, where an epoch ends, where the evaluation falls, and after several epochs.
@pytest.mark.parametrize(("passes", "at"), [(1, 7), (1, 8), (1, 5), (2, 3), (2, 10)])
def test_interrupted_and_resumed_is_uninterrupted(
    backbones: tuple[Path, Path],
    clips: Path,
    whole: dict[int, TrainingResult],
    tmp_path: Path,
    passes: int,
    at: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = configuration(backbones, clips, tmp_path, eval=clips, accumulation_steps=passes, **SETTINGS)
    before = signal.getsignal(signal.SIGINT)  # ignored in a shell's background
    stopped = train(config, callbacks=[Signal(at)])
    assert stopped.interrupted and stopped.steps == at and stopped.checkpoint == tmp_path / f"checkpoint-{at}"
    said = capsys.readouterr().err
    assert f"stopped after step {at} of 12" in said and f"steermoe train {tmp_path / 'training_config.yaml'} --resume" in said
    assert signal.getsignal(signal.SIGINT) is before
    resumed = train(tmp_path / "training_config.yaml", resume=True)
    assert not resumed.interrupted
    _assert_same_run(resumed, whole[passes])


def test_resumed_from_a_named_checkpoint(
    backbones: tuple[Path, Path], clips: Path, whole: dict[int, TrainingResult], tmp_path: Path
) -> None:
    """Later ones have to go first: else `--resume` would take them for this run's, and the limit on their number this run's for old."""
    config = configuration(backbones, clips, tmp_path / "first", eval=clips, **SETTINGS)
    train(config, callbacks=[Signal(6, signal.SIGTERM)])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="holds checkpoint-6, later than the checkpoint-4 to go on from: move it away"):
        train(config, resume=tmp_path / "first" / "checkpoint-4")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    for step in (5, 6):
        shutil.rmtree(tmp_path / "first" / f"checkpoint-{step}")
    resumed = train(config, resume=tmp_path / "first" / "checkpoint-4")
    _assert_same_run(resumed, whole[1])


@pytest.mark.parametrize("best_is_gone", [False, True])
def test_resumed_into_another_folder(
    backbones: tuple[Path, Path],
    clips: Path,
    whole: dict[int, TrainingResult],
    tmp_path: Path,
    best_is_gone: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The best checkpoint so far comes along: no later one may be better."""
    best = whole[1].checkpoint.name
    assert int(best.removeprefix("checkpoint-")) < 8, "else this shows nothing"
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(whole[1].last_checkpoint.parent, first)
    if best_is_gone:
        shutil.rmtree(first / best)
    resumed = train(configuration(backbones, clips, second, eval=clips, **SETTINGS), resume=first / "checkpoint-8")
    assert resumed.best_score == whole[1].best_score and curve(resumed.history) == curve(whole[1].history)
    assert resumed.checkpoint == (resumed.last_checkpoint if best_is_gone else second / best)
    verify(resumed.checkpoint)
    trained, expected = resumed.model.trained_parameters(), load_file((resumed.checkpoint if best_is_gone else first / best) / WEIGHTS_NAME)
    assert trained.keys() == expected.keys() and all(torch.equal(trained[name], expected[name]) for name in trained)
    assert ("in a checkpoint that is not there any more" if best_is_gone else f"in {second / best}") in capsys.readouterr().err


def test_a_finished_run_is_not_trained_on(whole: dict[int, TrainingResult], capsys: pytest.CaptureFixture[str]) -> None:
    run = whole[1].last_checkpoint.parent
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and "checkpoint-" in str(path)}
    again = train(run / TRAINING_CONFIG_NAME, resume=True)
    assert again.steps == whole[1].steps and again.checkpoint == whole[1].checkpoint and not again.interrupted
    assert curve(again.history) == curve(whole[1].history)
    for name, weights in again.model.trained_parameters().items():
        assert torch.equal(weights, whole[1].model.trained_parameters()[name]), name
    assert "finished after step 12 already" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and "checkpoint-" in str(path)}


def test_another_runs_folder_is_refused(
    backbones: tuple[Path, Path], clips: Path, whole: dict[int, TrainingResult], tmp_path: Path
) -> None:
    config = configuration(backbones, clips, tmp_path, **SETTINGS)
    train(config)
    with pytest.raises(FileExistsError, match="holds checkpoint-12 of an earlier run: resume that, or choose another folder"):
        train(configuration(backbones, clips, tmp_path, eval=clips, **SETTINGS), resume=whole[1].last_checkpoint.parent / "checkpoint-4")
    with pytest.raises(CheckpointError, match="is the end of its run: there is nothing to go on with"):
        train(
            configuration(backbones, clips, tmp_path / "new", eval=clips, **SETTINGS),
            resume=whole[1].last_checkpoint.parent / "checkpoint-12",
        )


def test_two_runs_in_one_folder_are_refused(backbones: tuple[Path, Path], clips: Path, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(FileExistsError, match=r"another run is writing to .*: wait for it, or choose another"):
        train(configuration(backbones, clips, tmp_path, **SETTINGS))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_start_leaves_nothing_behind(backbones: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        train(configuration(backbones, tmp_path / "gone.jsonl", tmp_path / "run", **SETTINGS))
    assert list(tmp_path.iterdir()) == []


def test_backbones_that_changed_are_refused(backbones: tuple[Path, Path], clips: Path, tmp_path: Path) -> None:
    text_model = shutil.copytree(backbones[1], tmp_path / "text")
    config = configuration((backbones[0], text_model), clips, tmp_path / "run", **SETTINGS)
    train(config, callbacks=[Signal(5)])
    weights = load_file(text_model / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, text_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"checkpoint-5 was made with a text_model of fingerprint .*: its weights have changed since"):
        train(config, resume=True)


def test_backbones_whose_settings_changed_are_refused(
    backbones: tuple[Path, Path], clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text_model = shutil.copytree(backbones[1], tmp_path / "text")
    config = configuration((backbones[0], text_model), clips, tmp_path / "run", **SETTINGS)
    train(config, callbacks=[Signal(5)])
    path = text_model / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"rms_norm_eps": 0.5}))
    words = (
        r"checkpoint-5 was made with a text_model of other settings, and the weights are the same: setting rms_norm_eps is 0.5 instead of"
    )
    with pytest.raises(CheckpointError, match=words):
        train(config, resume=True)
    path.write_text(before)
    assert train(config, resume=True).steps == SETTINGS["max_steps"]
    assert "does not record the settings" not in caplog.text


def test_rows_that_changed_are_refused(backbones: tuple[Path, Path], tmp_path: Path) -> None:
    clips = corpus(tmp_path / "clips", CLIPS)
    config = configuration(backbones, clips, tmp_path / "run", **SETTINGS)
    train(config, callbacks=[Signal(5)])
    rows = clips.read_text().splitlines(keepends=True)
    for changed, words in (
        (rows[:-1], "7 rows to learn from then, 6 now"),
        ([rows[0].replace('"text": "', '"text": "not '), *rows[1:]], "as many rows as then, 7, and other ones"),
    ):
        clips.write_text("".join(changed))
        with pytest.raises(CheckpointError, match=rf"checkpoint-5 was made with another data.train.*: {words}"):
            train(config, resume=True)
    clips.write_text("".join(rows))
    assert train(config, resume=True).steps == SETTINGS["max_steps"]


def test_corpora_and_backbones_that_moved_are_the_same_ones(
    backbones: tuple[Path, Path], clips: Path, whole: dict[int, TrainingResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or are named otherwise, as by a relative path. What is not the same there is refused, before anything of the run is touched."""
    train(configuration(backbones, clips, tmp_path / "run", eval=clips, **SETTINGS), callbacks=[Signal(7)])
    moved = [Path(shutil.copytree(folder, tmp_path / name)) for folder, name in zip((*backbones, clips.parent), "abc", strict=True)]
    audio_model, text_model, rows = moved[0], moved[1], moved[2] / clips.name
    monkeypatch.chdir(tmp_path)
    config = configuration((audio_model, Path("b")), Path("c") / clips.name, tmp_path / "run", eval=clips, **SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for path, other, words in (
        (rows, rows.read_bytes().replace(b'"text": "', b'"text": "not ', 1), "as many rows as then, 7, and other ones"),
        (
            moved[2] / "3.wav",
            (moved[2] / "3.wav").read_bytes()[:-2] + b"ab",
            "texts are those of then, and the audio of the 7 rows is other",
        ),
        (
            text_model / "chat_template.jinja",
            b"{{ messages }}",
            "another tokenizer or feature extractor .* its chat_template.jinja differs",
        ),
        (audio_model / "config.json", None, "a audio_model of other settings"),
    ):
        content = path.read_bytes()
        path.write_bytes(json.dumps(json.loads(content) | {"activation_function": "relu"}).encode() if other is None else other)
        with pytest.raises(CheckpointError, match=f"checkpoint-7 was made with .*{words}"):
            train(config, resume=True)
        path.write_bytes(content)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    model, processor = build(config.model)
    processor.tokenizer.init_kwargs["is_local"] = False  # as of a hub
    _assert_same_run(train(config, resume=True, model=model, processor=processor), whole[1])


def test_what_does_not_prove_its_content_is_not_taken_for_the_same(backbones: tuple[Path, Path], tmp_path: Path) -> None:
    """A checkpoint from before the audio was recorded."""
    clips = corpus(tmp_path / "clips", CLIPS)
    train(configuration(backbones, clips, tmp_path / "run", **SETTINGS), callbacks=[Signal(5)])
    checkpoint = tmp_path / "run" / "checkpoint-5"
    rows = json.loads((checkpoint / ROWS_NAME).read_text())
    del rows["audio_sha256"]
    (checkpoint / ROWS_NAME).write_text(json.dumps(rows))
    checkpoint.rename(staging_folder(checkpoint))
    seal(checkpoint)
    other = clips.rename(clips.with_name("renamed.jsonl"))
    with pytest.raises(CheckpointError, match=r"other settings(?s:.*)data\.train: '.*clips\.jsonl' then, '.*renamed\.jsonl' now$"):
        train(configuration(backbones, other, tmp_path / "run", **SETTINGS), resume=True)
    other.rename(clips)
    assert train(configuration(backbones, clips, tmp_path / "run", **SETTINGS), resume=True).steps == SETTINGS["max_steps"]


def test_a_signal_to_all_processes_leaves_the_workers_at_work(backbones: tuple[Path, Path], tmp_path: Path) -> None:
    """As a scheduler sends it: workers that died of it would take the checkpoint along."""

    class Everybody(Signal):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == self.at:
                workers = [str(child.pid) for child in multiprocessing.active_children()]
                assert workers
                # Somebody else sends it: from this process the workers would take it for an order.
                subprocess.run([sys.executable, "-c", KILL, str(int(self.number)), *workers, str(os.getpid())], check=True)

    many = corpus(tmp_path / "clips", 40)  # more than the workers have fetched by then
    config = configuration(backbones, many, tmp_path, batch_size=1, **(SETTINGS | {"max_steps": 40}))
    config.data.num_workers = 2
    for number in (signal.SIGTERM, signal.SIGINT):
        config.training.output_dir = str(tmp_path / number.name)
        stopped = train(config, callbacks=[Everybody(2, number)])
        assert stopped.interrupted and stopped.steps == 2
        verify(stopped.last_checkpoint)


@pytest.mark.parametrize("twice", [False, True], ids=["bad rows", "second Ctrl-C"])
def test_a_run_that_fails_ends_with_its_workers(backbones: tuple[Path, Path], tmp_path: Path, twice: bool) -> None:
    """A process that exits sends its workers SIGTERM and waits for them; and what one of them met is said in its own words."""
    manifest = corpus(tmp_path / "clips", CLIPS)
    if not twice:
        for index in range(5):
            (tmp_path / "clips" / f"{index}.wav").write_bytes(b"no audio at all")
        manifest.write_text("no row\n" * 8 + manifest.read_text())
    config = configuration(backbones, manifest, tmp_path / "run", max_steps=None, epochs=1 if not twice else 1000)
    config.data.num_workers, config.data.max_bad_rows = 1, 12
    config.save(tmp_path / "run.yaml")
    program = """
import multiprocessing, os, signal, sys
from transformers import TrainerCallback
from steermoe import training
from steermoe_console import main
class Press(TrainerCallback):
    def on_step_begin(self, *_, **__):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
train = training.train
if "twice" in sys.argv:
    sys.argv.remove("twice")
    training.train = lambda *arguments, **settings: train(*arguments, callbacks=[Press()], **settings)
main()
"""
    command = [sys.executable, "-c", program, "train", str(tmp_path / "run.yaml"), *["twice"] * twice]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if twice:
        assert run.returncode == 130 and run.stderr.endswith("interrupted\n"), run.stderr
        assert run.stdout and not any(Path(f"/proc/{worker}").exists() for worker in run.stdout.split())
    else:
        assert run.returncode == 1 and "Traceback" not in run.stderr
        assert "error: 5 bad rows, and max_bad_rows allows 4: mend or remove them, or allow more\n" in run.stderr


def test_ctrl_c_while_scoring_saves_too(
    backbones: tuple[Path, Path], clips: Path, whole: dict[int, TrainingResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steermoe import trainer

    config = configuration(backbones, clips, tmp_path, eval=clips, **SETTINGS)

    def press(*arguments: Any, **settings: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal should have ended the evaluation")

    monkeypatch.setattr(trainer, "evaluate", press)
    stopped = train(config)
    assert stopped.interrupted and stopped.last_checkpoint.name == "checkpoint-5"
    monkeypatch.undo()
    _assert_same_run(train(config, resume=True), whole[1])


def test_a_second_ctrl_c_ends_at_once(backbones: tuple[Path, Path], clips: Path, tmp_path: Path) -> None:
    class Twice(Signal):
        def on_step_begin(self, *arguments: Any, **settings: Any) -> None:
            super().on_step_begin(*arguments, **settings)
            super().on_step_begin(*arguments, **settings)

    config = configuration(backbones, clips, tmp_path, max_steps=4, save_steps=1)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[Twice(3)])
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is before


def _checkpointed(backbones: tuple[Path, Path], clips: Path, run: Path) -> TrainingConfig:
    config = configuration(backbones, clips, run, max_steps=6, save_steps=2, save_total_limit=None, logging_steps=1)
    train(config, callbacks=[Signal(4)])
    return config


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_truncated_checkpoint_is_named_and_the_one_before_taken(
    backbones: tuple[Path, Path], clips: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = _checkpointed(backbones, clips, tmp_path)
    cut = tmp_path / "checkpoint-4" / name
    os.truncate(cut, cut.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"checkpoint-4/{name} has .* it was cut off"):
        train(config, resume=tmp_path / "checkpoint-4")
    resumed = train(config, resume=True)
    assert "passed over" in caplog.text and f"checkpoint-4/{name}" in caplog.text
    assert [step for step, _ in resumed.losses] == [1, 2, 3, 4, 5, 6] and resumed.steps == 6
    verify(tmp_path / "checkpoint-4")
    for checkpoint in checkpoints_in(tmp_path):
        os.truncate(checkpoint / name, 1)
    with pytest.raises(CheckpointError, match=r"no sound checkpoint in .* to resume(?s:.*)checkpoint-6(?s:.*)checkpoint-2"):
        train(config, resume=True)


def test_a_full_disk_leaves_the_previous_checkpoint(
    backbones: tuple[Path, Path], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = configuration(backbones, clips, tmp_path, max_steps=6, save_steps=2, save_total_limit=1)
    write = AlignerTrainer._save_optimizer_and_scheduler

    def full(self: AlignerTrainer, folder: str) -> None:
        if self.state.global_step > 2:
            (Path(folder) / "optimizer.pt").write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(Path(folder) / "optimizer.pt"))
        write(self, folder)

    monkeypatch.setattr(AlignerTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(CheckpointError, match=r"checkpoint-6 could not be saved: .*No space left on device.*checkpoint-2 is untouched"):
        train(config)
    (said,) = (record.message for record in caplog.records if "checkpoint-4 could not be saved" in record.message)
    assert "resume from there" in said
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2"]
    verify(tmp_path / "checkpoint-2")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("unfinished")]
    monkeypatch.undo()
    resumed = train(config, resume=True)
    assert resumed.steps == 6
    whole = train(configuration(backbones, clips, tmp_path / "whole", max_steps=6, save_steps=2, save_total_limit=1))
    assert curve(resumed.history) == curve(whole.history)


def test_a_disk_that_is_full_for_a_while(
    backbones: tuple[Path, Path], clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(backbones, clips, tmp_path, max_steps=6, save_steps=2)
    sync = os.fsync
    failures = iter([True])

    def full_once(descriptor: int) -> None:
        if next(failures, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full_once)
    result = train(config)
    assert result.steps == 6 and [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-4", "checkpoint-6"]


def test_only_the_same_run_is_resumed(backbones: tuple[Path, Path], clips: Path, tmp_path: Path) -> None:
    config = _checkpointed(backbones, clips, tmp_path / "run")
    config.training.router_learning_rate = 0.5
    config.training.logging_steps = 3
    message = r"checkpoint-4 was made under other settings(?s:.*)training\.router_learning_rate: 0\.001 then, 0\.5 now$"
    with pytest.raises(CheckpointError, match=message):
        train(config, resume=True)
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        train(configuration(backbones, clips, tmp_path / "empty"), resume=True)
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        train(config, resume=tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(CheckpointError, match="is no checkpoint of a training run, or was never finished"):
        train(config, resume=tmp_path / "checkpoint-1")
