"""`check`: what is wrong with a corpus is found, each fault in its place, and a sound corpus passes."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console
from tones import record, speak

from steermoe.data.check import check

SPEECH = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "speech"


def manifest(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_sound_corpus_passes(tmp_path: Path) -> None:
    words = ["one two", "three", "four five six"]
    for index, text in enumerate(words):
        record(tmp_path / f"{index}.wav", text)
    rows = [{"audio_filepath": f"{index}.wav", "text": text, "duration": 0.5 * len(text.split())} for index, text in enumerate(words)]
    report = check(manifest(tmp_path, *rows))
    assert report.exit_status == 0 and report.rows == 3
    assert report.seconds.tolist() == [1.0, 0.5, 1.5]
    assert all(not finding.rows for finding in report.findings)
    assert dict(report.histogram())["1 to 2 s"] == 2 and sum(count for _, count in report.histogram()) == 3


@pytest.mark.parametrize("seconds", [-3.0, 0.0, float("nan"), float("inf")])
def test_a_longest_clip_that_is_none_is_refused(tmp_path: Path, seconds: float) -> None:
    record(tmp_path / "a.wav", "one")
    path = manifest(tmp_path, {"audio_filepath": "a.wav", "text": "one"})
    with pytest.raises(ValueError, match=f"^max_seconds must be finite and above 0, got {seconds:g}$"):
        check(path, max_seconds=seconds)


def test_every_fault_is_found(tmp_path: Path) -> None:
    record(tmp_path / "good.wav", "one two")
    soundfile.write(tmp_path / "same.flac", soundfile.read(tmp_path / "good.wav", dtype="int16")[0], 16000)
    record(tmp_path / "low.wav", "one", rate=8000)
    record(tmp_path / "long.wav", "one two three " * 21)
    soundfile.write(tmp_path / "stereo.wav", np.stack([speak("five"), speak("six")], axis=1), 16000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    soundfile.write(tmp_path / "clipped.wav", np.clip(9 * speak("two"), -1, 1), 16000)
    soundfile.write(tmp_path / "scale.wav", 32768 * speak("two"), 16000, subtype="FLOAT")
    opposite = np.stack([speak("five"), -speak("five")], axis=1)
    soundfile.write(tmp_path / "opposite.wav", opposite, 16000)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("transcript " * 100)
    (tmp_path / "cut.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:20000])
    path = manifest(
        tmp_path,
        {"audio_filepath": "good.wav", "text": "one two", "duration": 1.0, "id": "a"},
        {"audio_filepath": "same.flac", "text": "one two", "id": "a"},
        {"audio_filepath": "low.wav", "text": "one", "duration": 9.0},
        {"audio_filepath": "long.wav", "text": "many", "duration": 12.0},
        {"audio_filepath": "stereo.wav", "text": " "},
        {"audio_filepath": "silent.wav", "text": None},
        {"audio_filepath": "clipped.wav", "text": "two"},
        {"audio_filepath": "empty.wav", "text": "x"},
        {"audio_filepath": "text.wav", "text": "x"},
        {"audio_filepath": "cut.wav", "text": "x"},
        {"audio_filepath": "gone.wav", "text": "x"},
        {"audio_filepath": "scale.wav", "text": "x"},
        {"audio_filepath": "opposite.wav", "text": "x"},
    )
    report = check(path)

    def lines(name: str) -> list[int]:
        return [int(problem.where.rpartition(":")[2]) for problem in report.finding(name)]

    assert report.exit_status == 1 and report.rows == 13 and len(report.seconds) == 8
    assert lines("bad rows") == [11]
    assert lines("unreadable audio") == [8, 9, 10, 12]
    assert lines("empty texts") == [5, 6]
    assert lines("duplicate ids") == [2] and lines("duplicate audio") == [2]
    assert report.finding("duplicate audio")[0].reason == f"the same audio as {path}:1"
    assert lines("low sampling rates") == [3]
    assert lines("wrong durations") == [3, 4]
    assert report.finding("wrong durations")[1].reason == "declared 12.00 s, really 31.50 s"
    assert lines("long clips") == []
    assert lines("silent") == [6, 13] and lines("clipped") == [7]
    assert report.rates == {16000: 7, 8000: 1} and report.channels == {1: 6, 2: 2}
    printed = io.StringIO()
    Console(width=300, file=printed).print(report)
    shown = printed.getvalue()
    assert "unreadable audio (4)" in shown and "text.wav is not audio" in shown and "declared 12.00 s" in shown
    assert json.loads(json.dumps(report.to_dict()))["findings"]["silent"]["rows"][0]["where"] == f"{path}:6"
    with pytest.raises(KeyError):
        report.finding("loud")


def test_a_corpus_without_a_usable_row_is_reported(tmp_path: Path) -> None:
    report = check(manifest(tmp_path, {"audio_filepath": "gone.wav"}, {"text": "x"}))
    assert report.rows == 2 and len(report.finding("bad rows")) == 2 and report.exit_status == 1
    printed = io.StringIO()
    Console(width=200, file=printed).print(report)
    assert "bad rows (2)" in printed.getvalue()
    json.dumps(report.to_dict(), allow_nan=False)


def test_texts_and_prompts_that_no_processor_takes(tmp_path: Path) -> None:
    record(tmp_path / "a.wav", "one two three")
    path = manifest(
        tmp_path,
        {"audio_filepath": "a.wav", "text": "smile \ud83d"},
        {"audio_filepath": "a.wav", "text": "hear <|audio|>"},
        {"audio_filepath": "a.wav", "text": "x", "prompt": "<|audio|> or <|audio|>?"},
        {"audio_filepath": "a.wav", "text": "x", "prompt": "What is <|audio|>?"},
        {"audio_filepath": "a.wav", "text": "x", "note": "\ud83d\ude00 \ude00"},
    )
    report = check(path)
    assert report.exit_status == 1
    assert [str(problem) for problem in report.finding("unusable texts")] == [
        f"{path}:2: text holds <|audio|>, which stands for audio in prompts: 'hear <|audio|>'",
        f"{path}:3: prompt has 2 <|audio|> placeholders for 1 clips: '<|audio|> or <|audio|>?'",
    ]
    assert [problem.reason.partition(" (")[0] for problem in report.finding("bad rows")] == [
        "field 'text' holds a lone surrogate",
        "field 'note' holds a lone surrogate",
    ]
    # A recording of two clips has room for two placeholders.
    assert len(check(path, max_seconds=1.0).finding("unusable texts")) == 1


def test_a_corpus_without_any_row_is_an_error(tmp_path: Path) -> None:
    record(tmp_path / "a.wav", "one")
    (tmp_path / "empty").mkdir()
    empty, full = manifest(tmp_path / "empty"), manifest(tmp_path, {"audio_filepath": "a.wav", "text": "x"})
    for spec in (empty, [full, empty]):
        with pytest.raises(ValueError, match=r"empty/manifest\.jsonl has no rows; looked for"):
            check(spec)


def test_sections_of_one_file_are_neither_duplicates_nor_wrong(tmp_path: Path) -> None:
    record(tmp_path / "a.wav", "one two three four")
    rows = [{"audio_filepath": "a.wav", "text": "x", "offset": 0.5 * index, "duration": 0.5} for index in range(4)]
    report = check(manifest(tmp_path, *rows))
    assert all(not finding.rows for finding in report.findings)
    report = check(manifest(tmp_path, *rows, {**rows[1], "id": "again"}))
    assert len(report.finding("duplicate audio")) == 1


def test_two_hours_are_checked_block_by_block(tmp_path: Path) -> None:
    with soundfile.SoundFile(tmp_path / "long.wav", "w", 1000, 1, subtype="PCM_U8") as file:
        for _ in range(120):
            file.write(0.1 * np.random.default_rng(0).standard_normal(60_000).astype(np.float32))
    path = manifest(tmp_path, {"audio_filepath": "long.wav", "text": "x"})
    tracemalloc.start()
    report = check(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.seconds.tolist() == [7200.0] and len(report.finding("long clips")) == 1
    assert dict(report.histogram())["60 s and more"] == 1
    assert peak < 4_000_000


@pytest.mark.skipif(not SPEECH.is_dir(), reason="no recorded speech beside the repository")
def test_recordings() -> None:
    report = check(SPEECH)
    assert report.rows == 2008 and len(report.seconds) == 2008
    assert report.rates == {8000: 2000, 16000: 7, 44100: 1}
    assert len(report.finding("empty texts")) == 2 and report.exit_status == 1
    assert report.finding("wrong durations") == [] and report.finding("silent") == []
