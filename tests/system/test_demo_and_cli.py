"""The demo from synthesis to report, and the command line on the checkpoint that it leaves."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console
from safetensors.torch import load_file
from tones import ToneModel, ToneProcessor, record

pytest.importorskip("espeakng_loader", reason="speech synthesis needs the espeakng-loader wheel")

from steermoe.backbones import encoder_path, language_model_path
from steermoe.demo import demonstration
from steermoe.demo.report import wer_by_voice
from steermoe.demo.speech import HELD_OUT_VOICES
from steermoe.training_config import ModelConfig
from steermoe_console import cli

try:
    encoder_path(), language_model_path()
except FileNotFoundError as missing:
    pytest.skip(str(missing), allow_module_level=True)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[demonstration.DemoResult, Path]:
    """A demo of the fewest steps, and its folder."""
    folder = tmp_path_factory.mktemp("demo")
    return demonstration.run(folder, minutes=0.01, training_clips=96, per_voice=1), folder


def steermoe(*arguments: object) -> subprocess.CompletedProcess:
    """The command line in this process, which has imported what takes a new one seconds."""
    said, errors = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["steermoe", *map(str, arguments)]),
        patch.dict(os.environ, COLUMNS="200"),
        redirect_stdout(said),
        redirect_stderr(errors),
    ):
        try:
            cli.main()
            status = 0
        except SystemExit as leaving:
            status = int(leaving.code or 0)
    return subprocess.CompletedProcess(arguments, status, said.getvalue(), errors.getvalue())


# --- the demo -----------------------------------------------------------------------------------------------------------------------------


def test_training_helps_on_voices_never_heard(shown: tuple[demonstration.DemoResult, Path]) -> None:
    result, _ = shown
    for rival in (result.steered, result.projection):
        assert rival.untrained.errors is not None and rival.trained.errors is not None
        assert rival.steps == demonstration.FEWEST_STEPS
        assert rival.trained.errors.wer.rate < 0.8 * rival.untrained.errors.wer.rate
        assert rival.losses[-1][1] < 0.5 * rival.losses[0][1]
    assert result.wer == result.steered.trained.errors.wer.rate  # type: ignore[union-attr]
    assert set(wer_by_voice(result.steered.trained)) == {str(voice) for voice in HELD_OUT_VOICES}


def test_the_projection_alone_steers_nothing(shown: tuple[demonstration.DemoResult, Path]) -> None:
    result, folder = shown
    assert result.steered.parameters > result.projection.parameters > 0
    found = json.loads(steermoe("inspect", result.projection.checkpoint, "--json").stdout)
    assert found["layer_scales"] == [0.0] * len(found["layer_scales"])
    assert folder in result.projection.checkpoint.parents
    # Trained by itself: from the same first projection, it came to another one.
    first, second = (load_file(rival.checkpoint / "model.safetensors") for rival in (result.steered, result.projection))
    assert not torch.equal(first["prompt_proj.weight"], second["prompt_proj.weight"])
    assert result.steered.losses != result.projection.losses


def test_the_backbones_are_untouched(shown: tuple[demonstration.DemoResult, Path]) -> None:
    assert shown[0].preservation.passed, shown[0].preservation.report()


def test_the_report_holds_everything_and_loads_nothing(shown: tuple[demonstration.DemoResult, Path]) -> None:
    result, folder = shown
    page = (folder / "report.html").read_text()
    for words in (f"{result.wer:.1%} word error rate", "The router", "Steered, and the projection alone", result.question[0]):
        assert words in page
    assert page.count("data:image/png;base64,") == 3 and "data:audio/flac;base64," in page
    assert not re.search(r"""(?:src|href)=(?!["']data:)""", page)
    assert {"reference", "cpu"} <= result.timings.keys() | {"cpu"}


def test_the_reports_numbers_are_there_to_be_read(shown: tuple[demonstration.DemoResult, Path]) -> None:
    result, folder = shown
    numbers = json.loads((folder / "report.json").read_text())
    for rival in (result.steered, result.projection):
        found = numbers["aligners"][rival.name]
        assert found["trained"]["wer"] == rival.trained.errors.wer.rate  # type: ignore[union-attr]
        assert found["trained"]["wer_by_voice"] == wer_by_voice(rival.trained)
        assert (found["parameters"], found["steps"]) == (rival.parameters, rival.steps)
        heard = [(row.id, row.reference, row.hypothesis) for row in rival.trained.hypotheses]
        assert [(clip["id"], clip["said"], clip[rival.name]) for clip in numbers["held_out"]] == heard
    assert numbers["backbones_bit_identical"] is True and numbers["machine"] == result.machine


def test_bad_budget(tmp_path: Path) -> None:
    for minutes in (0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"minutes must be above 0 and finite, got {minutes}"):
            demonstration.run(tmp_path / "x", minutes=minutes)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_bad_seed(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed must be from 0 to 4294967295, got {seed}"):
        demonstration.run(tmp_path / "x", seed=seed)
    assert not (tmp_path / "x").exists()


def test_the_demo_removes_nothing_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def synthesised(*_: object, **__: object) -> None:
        raise AssertionError("the demo has begun")

    monkeypatch.setattr(demonstration, "_record", synthesised)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file is a file: the demo needs a folder"):
        demonstration.run(tmp_path / "file")
    work = tmp_path / "work" / "training" / "data.txt"
    work.parent.mkdir(parents=True)
    work.write_text("mine")
    with pytest.raises(FileExistsError, match=r"work is not empty and not an earlier demo's, .*: give a new or empty folder"):
        demonstration.run(tmp_path / "work")
    assert work.read_text() == (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.rglob("*"))) == 4
    for _ in range(2):  # a folder of its own may be used again, also where the first run was cut off
        with pytest.raises(AssertionError, match="the demo has begun"):
            demonstration.run(tmp_path / "new")


def test_ctrl_c_in_training_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training itself saves a checkpoint, and returns."""
    monkeypatch.setattr(demonstration, "build", lambda *_, **__: (None, None))
    monkeypatch.setattr(demonstration, "_evaluate", lambda *_, **__: None)
    monkeypatch.setattr(demonstration, "_words", str)
    monkeypatch.setattr(demonstration, "train", lambda *_, **__: SimpleNamespace(interrupted=True))
    config = ModelConfig("shipped", "shipped")
    with pytest.raises(KeyboardInterrupt):
        demonstration._train("steered", config, tmp_path, tmp_path, tmp_path, 1, 0, Console())


# --- the command line ---------------------------------------------------------------------------------------------------------------------


def test_transcribe_in_every_form_and_name_what_cannot_be_read(shown: tuple[demonstration.DemoResult, Path], tmp_path: Path) -> None:
    result, folder = shown
    clip, broken = folder / "held-out" / "0000.flac", tmp_path / "broken.wav"
    broken.write_text("not audio")
    run = steermoe("transcribe", clip, broken, "-c", result.steered.checkpoint)
    assert run.returncode == 1 and "broken.wav" in run.stderr and str(clip) in run.stdout
    assert len(run.stdout.splitlines()) == 1
    run = steermoe("transcribe", clip, "-c", result.steered.checkpoint, "-f", "srt", "--output-dir", tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "0000.srt").read_text().startswith("1\n00:00:00,000 --> ")
    spoken = json.loads(steermoe("transcribe", clip, "-c", result.steered.checkpoint, "-f", "json").stdout)
    assert spoken["segments"][0]["text"] == spoken["text"] != ""


def test_json_of_several_files_is_one_document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = [record(tmp_path / "a.wav", "one"), tmp_path / "gone.wav", record(tmp_path / "b.wav", "two")]
    monkeypatch.setattr(cli, "_load", lambda *_: (ToneModel(), ToneProcessor()))
    arguments = ("transcribe", *files, "-c", tmp_path, "-f", "json")
    monkeypatch.setattr(sys, "argv", ["steermoe", *map(str, arguments)])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    printed = capsys.readouterr()
    assert [(Path(row["source"]).name, row["text"]) for row in json.loads(printed.out)] == [("a.wav", "one"), ("b.wav", "two")]
    assert "gone.wav" in printed.err

    from steermoe import transcription

    transcribe = transcription.transcribe

    def interrupted(model: object, processor: object, file: Path, **options: object) -> transcription.Transcript:
        if file == files[2]:
            raise KeyboardInterrupt
        return transcribe(model, processor, file, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(transcription, "transcribe", interrupted)
    with pytest.raises(SystemExit, match="130"):
        cli.main()
    assert [row["text"] for row in json.loads(capsys.readouterr().out)] == ["one"]


def test_transcribe_more_than_the_language_model_takes_at_once(shown: tuple[demonstration.DemoResult, Path], tmp_path: Path) -> None:
    result, folder = shown
    clips = [soundfile.read(path)[0] for path in sorted((folder / "held-out").glob("*.flac"))]
    soundfile.write(tmp_path / "long.wav", np.tile(np.concatenate(clips), 3)[: 25 * 16000], 16000)
    blocked, out = folder / "held-out" / "0000.flac", tmp_path / "out"
    (out / "0000.txt").mkdir(parents=True)
    run = steermoe("transcribe", blocked, tmp_path / "long.wav", "-c", result.steered.checkpoint, "--output-dir", out)
    assert run.returncode == 1 and (out / "long.txt").read_text().strip(), run.stderr
    assert run.stderr.startswith("error: ") and str(blocked) in run.stderr and len(run.stderr.splitlines()) == 1
    run = steermoe("ask", tmp_path / "long.wav", "how many words?", "-c", result.steered.checkpoint)
    assert run.returncode == 1 and "long.wav is 25.0 s long, and the language model takes 18.5 s" in run.stderr


def test_ask(shown: tuple[demonstration.DemoResult, Path]) -> None:
    result, folder = shown
    run = steermoe("ask", folder / "held-out" / "0001.flac", "how many words?", "-c", result.steered.checkpoint)
    assert run.returncode == 0 and run.stdout.strip(), run.stderr
    assert not run.stderr  # no progress bar of loading weights in a pipe


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="needs a PyTorch without CUDA")
def test_a_device_that_cannot_be_used(shown: tuple[demonstration.DemoResult, Path]) -> None:
    result, folder = shown
    for device, status, words in [
        ("cuda", 1, f"error: --device cuda cannot be used: this PyTorch ({torch.__version__}) has no CUDA\n"),
        ("klingon", 2, "must be cpu, cuda or cuda:NUMBER, got 'klingon'"),
        ("meta", 1, "error: --device meta cannot be used here"),
    ]:
        run = steermoe("ask", folder / "held-out" / "0001.flac", "what?", "-c", result.steered.checkpoint, "--device", device)
        assert run.returncode == status and words in run.stderr and "Traceback" not in run.stderr, run.stderr


def test_eval_writes_every_hypothesis(shown: tuple[demonstration.DemoResult, Path], tmp_path: Path) -> None:
    result, folder = shown
    output = tmp_path / "hypotheses.jsonl"
    arguments = ("--prompt", demonstration.PROMPT, "-o", output, "--json")
    run = steermoe("eval", folder / "held-out" / "manifest.jsonl", "-c", result.steered.checkpoint, *arguments)
    assert run.returncode == 0, run.stderr
    assert len(output.read_text().splitlines()) == len(HELD_OUT_VOICES)
    assert 0 <= json.loads(run.stdout)["errors"]["raw_wer"]["rate"] <= 1.5


def test_scores_survive_a_file_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record(tmp_path / "a.wav", "one two")
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "a.wav", "text": "one three"}\n')
    (tmp_path / "h.jsonl").write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "h.jsonl")

    monkeypatch.setattr(cli, "_load", lambda *_: (ToneModel(), ToneProcessor()))
    monkeypatch.setattr(os, "replace", full)
    arguments = ("eval", tmp_path / "m.jsonl", "-c", tmp_path, "-o", tmp_path / "h.jsonl", "--json")
    monkeypatch.setattr(sys, "argv", ["steermoe", *map(str, arguments)])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    printed = capsys.readouterr()
    assert json.loads(printed.out)["errors"]["raw_wer"]["rate"] == 0.5 and printed.err == "error: h.jsonl: No space left on device\n"
    assert (tmp_path / "h.jsonl").read_text() == "old" and not list(tmp_path.glob("*.partial"))


def test_verify_finds_a_single_flipped_bit(shown: tuple[demonstration.DemoResult, Path], tmp_path: Path) -> None:
    result, _ = shown
    alone = [sys.executable, "-m", "steermoe.cli", "verify", str(result.steered.checkpoint)]
    run = subprocess.run(alone, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "untouched" in run.stdout, run.stdout + run.stderr
    corrupted = tmp_path / "language_model"
    corrupted.mkdir()
    for file in language_model_path().iterdir():
        content = bytearray(file.read_bytes())
        if file.name == "model.safetensors":
            content[-1001] ^= 1
        (corrupted / file.name).write_bytes(content)
    run = steermoe("verify", result.steered.checkpoint, "--text-model", corrupted)
    assert run.returncode == 1, run.stdout


def test_inspect_draws(shown: tuple[demonstration.DemoResult, Path], tmp_path: Path) -> None:
    result, _ = shown
    run = steermoe("inspect", result.steered.checkpoint, "-o", tmp_path / "experts.png")
    assert run.returncode == 0, run.stderr
    assert f"{result.steered.parameters:,}" in run.stdout and "entropy" in run.stdout
    assert (tmp_path / "experts.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_names_a_damaged_file(shown: tuple[demonstration.DemoResult, Path], tmp_path: Path) -> None:
    damaged = shutil.copytree(shown[0].steered.checkpoint, tmp_path / shown[0].steered.checkpoint.name)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    run = steermoe("inspect", damaged)
    assert run.returncode == 1 and not run.stdout
    assert run.stderr == f"error: {damaged / 'model.safetensors'} is damaged: its SHA-256 is not the recorded one\n"


def test_data_check_lists_what_is_wrong(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    (tmp_path / "m.jsonl").write_text(
        '{"audio_filepath": "a.wav", "text": "hello"}\n{"audio_filepath": "gone.wav", "text": "x"}\n{broken\n'
    )
    run = steermoe("data", "check", tmp_path / "m.jsonl")
    assert run.returncode == 1
    assert "gone.wav" in run.stdout and "3" in run.stdout
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "m.jsonl").rename(tmp_path / "elsewhere" / "m.jsonl")
    run = steermoe("data", "check", f"{{path: {tmp_path / 'elsewhere' / 'm.jsonl'}, audio_dir: {tmp_path}, first: 1}}", "--json")
    assert json.loads(run.stdout)["rows"] == 3, run.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("train", "nowhere.yaml"), 1, "nowhere.yaml"),
        (("train", "demo", "training.max_stepz=3"), 1, "max_steps"),
        (("transcribe", "a.wav", "-c", "nowhere"), 1, "nowhere"),
        (("transcribe", "a.wav"), 2, "--checkpoint"),
        (("transcribe", "a.wav", "-c", ".", "--output-dir", "afile"), 1, "--output-dir must be a folder, and afile is a file"),
        (
            ("transcribe", "x/a.wav", "y/a.mp3", "-c", ".", "--output-dir", "out"),
            1,
            "x/a.wav and y/a.mp3 would both be written to out/a.txt",
        ),
        (("transcribe", "a.wav", "b.wav", "-c", ".", "-f", "srt"), 2, "need a file each: give --output-dir"),
        (("eval", "nowhere", "-c", ".", "--language", "klingon"), 1, "language must be a code like en, zh or yue"),
        (("eval", "nowhere", "-c", "."), 1, "nowhere"),
        (("inspect", "nowhere"), 1, "no checkpoint of an aligner"),
        (("data", "check", "nowhere"), 1, "nowhere"),
        (("data", "check", "{path: nowhere, kind: librispeech}"), 1, "there is nothing at nowhere"),
        (("data", "check", "nowhere", "--max-seconds", "-3"), 1, "max_seconds must be finite and above 0, got -3"),
        (("data", "check", "{path: nowhere"), 1, "neither a path nor YAML"),
        (("frobnicate",), 2, "frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...], status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "afile").touch()
    monkeypatch.chdir(tmp_path)
    run = steermoe(*arguments)
    assert run.returncode == status, run.stdout + run.stderr
    assert words in run.stderr and "Traceback" not in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["afile"]


@pytest.mark.parametrize("error", [FloatingPointError("the loss is nan"), OverflowError("the loss is nan"), MemoryError("the loss is nan")])
def test_every_error_of_a_run_is_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert ended(monkeypatch, error, "ask", "a.wav", "what?", "-c", tmp_path) == 1
    assert capsys.readouterr().err == "error: the loss is nan\n"


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    error = ModuleNotFoundError("No module named 'accelerate'", name="accelerate")
    assert ended(monkeypatch, error, "ask", "a.wav", "what?", "-c", tmp_path) == 1
    said = "error: accelerate is not installed, and the extra `system` brings it: pip install 'steermoe-kernels[system]'\n"
    assert capsys.readouterr().err == said
    error = ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")
    assert ended(monkeypatch, error, "ask", "a.wav", "what?", "-c", tmp_path) == 1
    assert capsys.readouterr().err == "error: No module named 'deepspeed'\n"


def test_ctrl_c_in_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert ended(monkeypatch, KeyboardInterrupt(), "transcribe", "a.wav", "-c", tmp_path) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("library", ["typer", "torch"])
def test_ctrl_c_while_libraries_are_imported(library: str) -> None:
    interrupt = f"""
import signal, sys
class Interrupter:
    def find_spec(self, name, *_):
        if name == "{library}":
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                pass  # as libraries do that try out what can be imported
sys.meta_path.insert(0, Interrupter())
sys.argv = ["steermoe", "inspect", "nowhere"]
from steermoe_console import main
main()
"""
    run = subprocess.run([sys.executable, "-c", interrupt], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "status", "said"), [("--help", 0, "transcribe"), ("ask --help", 0, "question"), ("tell", 2, "'tell'")]
)
def test_the_console_script_answers_before_the_system_is_imported(arguments: str, status: int, said: str) -> None:
    program = """
import atexit, sys
from steermoe_console import main
atexit.register(lambda: sys.stderr.write(str({"torch", "transformers"} & sys.modules.keys())))
main()
"""
    run = subprocess.run([sys.executable, "-c", program, *arguments.split()], capture_output=True, text=True, timeout=60)
    assert run.returncode == status and said in run.stdout + run.stderr
    assert run.stderr.endswith("set()"), run.stderr


def ended(monkeypatch: pytest.MonkeyPatch, error: BaseException, *arguments: object) -> object:
    """The exit status of a command whose model cannot be loaded because of ``error``."""

    def load(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_load", load)
    monkeypatch.setattr(sys, "argv", ["steermoe", *map(str, arguments)])
    monkeypatch.delenv("STEERMOE_DEBUG", raising=False)
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    return leaving.value.code
