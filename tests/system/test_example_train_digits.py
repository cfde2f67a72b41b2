"""examples/train_digits.py from recordings to scores, briefly, and its one sentence for recordings that will not do."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from steermoe.backbones import encoder_path, language_model_path

_ROOT = Path(__file__).parents[2]
_DIGITS = _ROOT.parent / "shared" / "data" / "speech" / "fsdd"
RATE = 8000


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits", _ROOT / "examples" / "train_digits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_digits", module)
    spec.loader.exec_module(module)
    return module


def _tones(folder: Path, speakers: tuple[str, ...], takes: tuple[int, ...] = (0, 5)) -> Path:
    """A folder of the data set's shape, in which a digit is a tone, higher for a higher digit."""
    folder.mkdir()
    for pitch, speaker in enumerate(speakers):
        for digit in range(10):
            for take in takes:
                times = np.arange(RATE // 5) / RATE
                wave = 0.3 * np.sin(2 * np.pi * (200 + 60 * digit + 10 * pitch + take) * times)
                soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", wave, RATE)
    return folder


def _run(example: ModuleType, recordings: Path, output: Path, held_out: str) -> dict:
    sizes = ["--steps", "4", "--batch-size", "4", "--strings", "16", "--test-strings", "4"]
    assert example.main([str(recordings), "--held-out", held_out, "--output", str(output), *sizes]) == 0
    return json.loads((output / "scores.json").read_text())


def _rows(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


@pytest.mark.parametrize("recordings", ["tones", "speech"])
def test_from_recordings_to_scores(
    recordings: str, example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        encoder_path(), language_model_path()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    if recordings == "speech" and not _DIGITS.is_dir():
        pytest.skip("shared/data/speech is not beside the repository")
    folder = _DIGITS if recordings == "speech" else _tones(tmp_path / "recordings", ("high", "low"))
    held_out = "yweweler" if recordings == "speech" else "low"
    scores = _run(example, folder, tmp_path / "out", held_out)
    assert scores["held_out"] == held_out and scores["parameters"] > 0
    assert set(scores["wer"]) == {"held-out speaker, untrained", "training speakers, new takes", "held-out speaker"}
    words = sum(len(row["text"].split()) for row in _rows(tmp_path / "out" / "strings" / "held-out" / "manifest.jsonl"))
    assert scores["wer"]["held-out speaker"]["words"] == words
    assert f"{scores['wer']['held-out speaker']['rate']:.2%}" in capsys.readouterr().out


def test_nobody_is_trained_on_who_is_held_out(example: ModuleType, tmp_path: Path) -> None:
    """Speakers and takes are kept apart, a string is one speaker's, and its text says what was put together."""
    import random

    takes = example.find_takes(_tones(tmp_path / "recordings", ("a", "b", "c"), takes=(0, 4, 5, 49)))
    heard: dict[bool, set[Path]] = {True: set(), False: set()}
    read = soundfile.read
    for test in (False, True):

        def keep(path: Path, test: bool = test, **settings: object) -> object:
            heard[test].add(path)
            return read(path, **settings)

        example.soundfile.read = keep
        try:
            manifest = example.write_strings(tmp_path / str(test), takes, ["a", "b"], 12, random.Random(0), test=test)
        finally:
            example.soundfile.read = read
        rows = _rows(manifest)
        assert {row["speaker"] for row in rows} == {"a", "b"}
        for row in rows:
            assert example.DIGITS[0] <= len(row["text"].split()) <= example.DIGITS[1]
            assert set(row["text"].split()) <= set(example.WORDS)
            samples, rate = read(manifest.parent / row["audio_filepath"])
            assert rate == RATE and len(samples) > 0.2 * RATE * len(row["text"].split())
    assert {path.stem.split("_")[2] for path in heard[True]} == {"0", "4"}
    assert {path.stem.split("_")[2] for path in heard[False]} == {"5", "49"}


@pytest.mark.parametrize("fault", ["missing", "empty", "no take to test on", "no such speaker", "one speaker"])
def test_recordings_that_will_not_do(fault: str, example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, held_out = tmp_path / "recordings", "b"
    if fault == "empty":
        folder.mkdir()
    elif fault != "missing":
        _tones(folder, ("a",) if fault == "one speaker" else ("a", "b"), takes=(5, 6) if fault == "no take to test on" else (0, 5))
    if fault == "one speaker":
        held_out = "a"
    if fault == "no such speaker":
        held_out = "nobody"
    assert example.main([str(folder), "--held-out", held_out, "--output", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert str(folder) in message and not (tmp_path / "out").exists()


def test_the_projection_alone_leaves_the_encoder_unsteered(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        encoder_path(), language_model_path()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    sizes = ["--steps", "2", "--batch-size", "2", "--strings", "8", "--test-strings", "2"]
    recordings = _tones(tmp_path / "recordings", ("high", "low"))
    assert example.main([str(recordings), "--held-out", "low", "--output", str(tmp_path / "out"), "--projection-only", *sizes]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["steered"] is False and scores["parameters"] == 192 * 192 + 192
    weights = load_file(tmp_path / "out" / "run" / "checkpoint-2" / "model.safetensors")
    assert not weights["layer_scales"].any()
