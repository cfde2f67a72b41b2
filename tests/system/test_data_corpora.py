"""Every kind of corpus: the rows it yields, the ones it names as bad, and how a path's kind is told."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile
from tones import record, speak

from steermoe import data
from steermoe.data.corpus import TooManyBadRows

SPEECH = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "speech"


def write_manifest(folder: Path, *lines: object) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def test_manifest_fields(tmp_path: Path) -> None:
    audio = record(tmp_path / "clips" / "a.wav", "one two")
    path = write_manifest(
        tmp_path,
        {"audio_filepath": "clips/a.wav", "text": "one two", "duration": 1.0, "speaker": "s1"},
        "",
        {"audio_filepath": str(audio), "text": None, "offset": 0.5, "duration": 0.25, "id": 7},
        {"audio_filepath": "clips/a.wav", "prompt": "How many?", "answers": ["two", "2"]},
    )
    corpus = data.load(path)
    assert corpus.problems == [] and len(corpus) == 3
    first, second, third = corpus
    assert (first.audio, first.text, first.duration, first.id, first.extra) == (
        str(audio),
        "one two",
        1.0,
        "clips/a.wav",
        {"speaker": "s1"},
    )
    assert (second.text, second.offset, second.duration, second.id, second.where) == (None, 0.5, 0.25, "7", f"{path}:3")
    assert (third.prompt, third.text, third.answers, third.duration) == ("How many?", "two", ("two", "2"), None)
    assert corpus.durations().tolist() == [1.0, 0.25, 1.0]
    assert len(data.load({"path": str(tmp_path), "where": {"speaker": ["s1", "s2"]}})) == 1


def test_broken_lines_are_named_by_number(tmp_path: Path) -> None:
    record(tmp_path / "a.wav", "one")
    path = write_manifest(
        tmp_path,
        {"audio_filepath": "a.wav", "text": "one"},
        '{"audio_filepath": "a.wav", "text": ',
        "[1, 2]",
        {"text": "no audio"},
        {"audio_filepath": "missing.wav", "text": "one"},
        {"audio_filepath": "a.wav", "text": 5},
        {"audio_filepath": "a.wav", "text": "one", "duration": -1},
        {"audio_filepath": "a.wav", "text": "one", "duration": float("nan")},
        {"audio_filepath": "a.wav", "text": "one", "offset": True},
        {"audio_filepath": "a.wav", "text": "one", "answers": "one"},
    )
    with open(path, "ab") as file:
        file.write(b'{"audio_filepath": "a.wav", "text": "caf\xe9"}\n')
    corpus = data.load(path)
    assert len(corpus) == 1
    said = [
        "not JSON",
        "JSON object",
        "missing",
        "not there",
        "text must",
        "duration must",
        "duration must",
        "offset must",
        "answers must",
        "not UTF-8",
    ]
    assert [problem.where for problem in corpus.problems] == [f"{path}:{line}" for line in range(2, 12)]
    for problem, words in zip(corpus.problems, said, strict=True):
        assert words in problem.reason
    corpus.check_limit(10)
    with pytest.raises(TooManyBadRows, match=r"10 bad rows in .*max_bad_rows allows 9(.|\n)*manifest.jsonl:2: not JSON(.|\n)*and 5 more"):
        corpus.check_limit(9)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"duration": 10**400}, "duration must be a number of seconds, 0 or more and at most 1000000000, got 1000"),
        ({"offset": -(10**400)}, "offset must be a number of seconds, 0 or more and at most 1000000000, got -1000"),
        ({"duration": 1e308}, "duration must be a number of seconds, .*, got 1e\\+308"),
        ({"audio_filepath": "x" * 300 + ".wav"}, "x\\.\\.\\. cannot be looked at \\(File name too long\\)"),
        ({"audio_filepath": "x\0.wav"}, "is not there"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_row_that_the_system_or_floats_cannot_hold_is_bad(fields: dict[str, object], said: str, tmp_path: Path) -> None:
    record(tmp_path / "a.wav", "one")
    good = {"audio_filepath": "a.wav", "text": "one"}
    corpus = data.load(write_manifest(tmp_path, good | fields, good))
    assert len(corpus) == len(corpus.problems) == 1 and re.search(said, corpus.problems[0].reason)
    assert len(corpus.problems[0].reason) < 400


def test_rows_without_a_text_can_be_transcribed_and_not_learnt_from(tmp_path: Path) -> None:
    record(tmp_path / "a.wav", "one two three four")
    texts = ["one", None, "  ", "", "two"]
    corpus = data.load(write_manifest(tmp_path, *({"audio_filepath": "a.wav", "text": text} for text in texts)))
    assert len(corpus) == 5
    trained = corpus.for_training()
    assert [row.text for row in trained] == ["one", "two"]
    assert [problem.where.rpartition(":")[2] for problem in trained.problems] == ["2", "3", "4"]
    assert len(corpus.for_scoring()) == 4
    assert len(corpus.for_training(max_seconds=1.0).problems) == 5


def test_librispeech(tmp_path: Path) -> None:
    for name in ("0000", "0001", "0003"):
        record(tmp_path / "test-clean" / "61" / "70968" / f"61-70968-{name}.flac", "one")
    transcript = tmp_path / "test-clean" / "61" / "70968" / "61-70968.trans.txt"
    transcript.write_text("61-70968-0000 HE BEGAN A CONFUSED\n61-70968-0001 GIVE NOT SO\n61-70968-0002 NOT RECORDED\n")
    for spec in (tmp_path, tmp_path / "test-clean", {"path": str(tmp_path), "split": "test-clean"}, transcript.parent):
        corpus = data.load(spec)
        assert [(row.id, row.text) for row in corpus] == [("61-70968-0000", "HE BEGAN A CONFUSED"), ("61-70968-0001", "GIVE NOT SO")]
        assert corpus[0].extra == {"speaker": "61"}
        assert [str(problem) for problem in corpus.problems] == [
            f"{transcript}:3: no audio file 61-70968-0002{{.flac,.wav,.ogg,.mp3,.opus}} beside it",
            f"{transcript.parent / '61-70968-0003.flac'}: no line in 61-70968.trans.txt",
        ]
    with pytest.raises(FileNotFoundError, match="no split 'dev'; it has test-clean"):
        data.load({"path": tmp_path, "split": "dev"})


def test_librispeech_texts_after_any_white_space(tmp_path: Path) -> None:
    for index in range(4):
        record(tmp_path / f"1-2-{index}.flac", "one")
    (tmp_path / "1-2.trans.txt").write_text("1-2-0\tHE BEGAN\tA\n1-2-1  GIVE NOT\n 1-2-2 \t SO 1-2-2\n1-2-3\n")
    assert [(row.id, row.text) for row in data.load(tmp_path)] == [
        ("1-2-0", "HE BEGAN\tA"),
        ("1-2-1", "GIVE NOT"),
        ("1-2-2", "SO 1-2-2"),
        ("1-2-3", ""),
    ]


def test_of_a_librispeech_utterance_in_several_formats_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("1-2-0.wav", "1-2-0.ogg", "1-2-0.flac", "1-2-1.ogg", "1-2-1.wav"):
        record(tmp_path / name, "one")
    (tmp_path / "1-2.trans.txt").write_text("1-2-0 ONE\n1-2-1 ONE\n")
    listed = sorted(tmp_path.iterdir())
    for order in (listed, listed[::-1]):
        monkeypatch.setattr(Path, "iterdir", lambda self, order=order: iter(order))
        corpus = data.load(tmp_path)
        assert [row.audio for row in corpus] == [str(tmp_path / "1-2-0.flac"), str(tmp_path / "1-2-1.wav")]
        assert [str(problem) for problem in corpus.problems] == [
            f"{tmp_path / '1-2-0.wav'}: the same utterance as 1-2-0.flac",
            f"{tmp_path / '1-2-0.ogg'}: the same utterance as 1-2-0.flac",
            f"{tmp_path / '1-2-1.ogg'}: the same utterance as 1-2-1.wav",
        ]


@pytest.mark.parametrize("transcript", ["transcript/aishell_transcript_v0.8.txt", "trans.txt"])
def test_aishell(tmp_path: Path, transcript: str) -> None:
    for split, name in [("train", "BAC009S0002W0122"), ("test", "BAC009S0764W0121"), ("test", "BAC009S0764W0122")]:
        record(tmp_path / "wav" / split / name[6:11] / f"{name}.wav", "one")
    (tmp_path / transcript).parent.mkdir(exist_ok=True)
    lines = ["BAC009S0002W0122 而 对 楼市 成交", "BAC009S0764W0121 甚至 出现 a b 交易", "BAC009S0764W0199 没有 录音"]
    (tmp_path / transcript).write_text("\n".join(lines), encoding="utf-8")
    corpus = data.load(tmp_path)
    assert [(row.id, row.text) for row in corpus] == [("BAC009S0764W0121", "甚至出现a b交易"), ("BAC009S0002W0122", "而对楼市成交")]
    assert corpus[0].extra == {"speaker": "S0764"}
    assert [problem.reason.split()[0] for problem in corpus.problems] == ["no", "no"] and len(corpus.problems) == 2
    test = data.load({"path": tmp_path, "split": "test"})
    assert len(test) == 1 and [Path(problem.where).stem for problem in test.problems] == ["BAC009S0764W0122"]
    with pytest.raises(FileNotFoundError, match="has test, train"):
        data.load({"path": tmp_path, "split": "dev"})
    (tmp_path / "wav" / "dev").mkdir()
    (tmp_path / "wav" / "dev" / "S0724.tar.gz").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="unpack them"):
        data.load({"path": tmp_path, "split": "dev"})


def test_a_second_file_or_line_of_an_utterance_is_named(tmp_path: Path) -> None:
    for place in ("train/S1/a.wav", "train/S2/a.wav", "train/S2/b.flac", "train/S2/b.wav", "test/S3/c.wav", "test/S3/d.wav"):
        record(tmp_path / "wav" / place, "one")
    transcript = tmp_path / "trans.txt"
    transcript.write_text("a one\nb two\nc three\na four\na five\nc three\ne six\ne six\n")
    wav = tmp_path / "wav"
    train = [
        f"{transcript}:4: the same utterance as line 1",
        f"{transcript}:5: the same utterance as line 1",
        f"{wav / 'train/S2/a.wav'}: the same utterance as {wav / 'train/S1/a.wav'}",
        f"{wav / 'train/S2/b.wav'}: the same utterance as {wav / 'train/S2/b.flac'}",
    ]
    test = [f"{transcript}:6: the same utterance as line 3", f"{wav / 'test/S3/d.wav'}: no line in trans.txt"]
    unheard = [f"{transcript}:{number}: no audio e.wav under {wav}" for number in (7, 8)]
    corpus = data.load(tmp_path)
    assert {row.id: (row.text, row.audio) for row in corpus} == {
        "a": ("one", str(wav / "train/S1/a.wav")),
        "b": ("two", str(wav / "train/S2/b.flac")),
        "c": ("three", str(wav / "test/S3/c.wav")),
    }
    assert [str(problem) for problem in corpus.problems] == [*test, *train, *unheard]
    assert [str(problem) for problem in data.load({"path": tmp_path, "split": "train"}).problems] == train
    (tmp_path / "libri").mkdir()
    record(tmp_path / "libri" / "1-2-0.flac", "one")
    transcript = tmp_path / "libri" / "1-2.trans.txt"
    transcript.write_text("1-2-0 ONE\n1-2-0 TWO\n")
    corpus = data.load(tmp_path / "libri")
    assert [row.text for row in corpus] == ["ONE"]
    assert [str(problem) for problem in corpus.problems] == [f"{transcript}:2: the same utterance as line 1"]


def test_clotho_aqa(tmp_path: Path) -> None:
    record(tmp_path / "audio_files" / "rain, heavy.wav", "one")
    table = tmp_path / "clotho_aqa_test.csv"
    table.write_text(
        "file_name,QuestionText,answer,confidence\n"
        '"rain, heavy.wav",Is it raining?,yes,yes\n"rain, heavy.wav",Is it raining?,no,maybe\n"rain, heavy.wav",Is it raining?,Yes,yes\n'
        '"rain, heavy.wav",What falls?,rain,yes\n"rain, heavy.wav",What falls?,water,yes\n'
        'gone.wav,Is it raining?,yes,yes\n,"What?",no,yes\n"rain, heavy.wav",Silence?,,yes\n',
        encoding="utf-8-sig",
    )
    for spec in (tmp_path, table, {"path": tmp_path, "split": "test"}):
        corpus = data.load(spec)
        assert [(row.prompt, row.text, row.answers) for row in corpus] == [
            ("Is it raining?", "yes", ("yes", "no", "Yes")),
            ("What falls?", "rain", ("rain", "water")),
        ]
        assert sorted(problem.reason.partition(" in ")[0] for problem in corpus.problems) == [
            "no answer",
            "no audio gone.wav",
            "no file name",
        ]
    wide = tmp_path / "wide.csv"
    wide.write_text('file,question,answer_1,answer_2,answer_3\n"rain, heavy.wav",Wet?,no,yes,yes\n')
    assert [(row.text, row.answers) for row in data.load(wide)] == [("yes", ("no", "yes", "yes"))]
    (tmp_path / "clotho_aqa_train.csv").write_text("file_name,QuestionText,answer\n")
    with pytest.raises(ValueError, match="split must be one of test, train for"):
        data.load(tmp_path)
    (tmp_path / "clotho_aqa_train.csv").write_text("name,QuestionText,answer\n")
    with pytest.raises(ValueError, match="needs columns file_name, QuestionText and answer, got name"):
        data.load({"path": tmp_path, "split": "train"})


def test_transcripts_that_are_not_utf8_are_bad_rows(tmp_path: Path) -> None:
    """Never texts with U+FFFD in them."""
    for name in ("1-2-0000", "1-2-0001"):
        record(tmp_path / "libri" / f"{name}.flac", "one")
        record(tmp_path / "aishell" / "wav" / "S1" / f"{name}.wav", "one")
    lines = b"\xef\xbb\xbf1-2-0000 CAF\xc3\xa9\n1-2-0001 CAF\xe9\n"
    for transcript in ("libri/1-2.trans.txt", "aishell/trans.txt"):
        (tmp_path / transcript).write_bytes(lines)
        corpus = data.load((tmp_path / transcript).parent)
        assert [row.text for row in corpus] == ["CAFé"]
        assert [str(problem) for problem in corpus.problems] == [f"{tmp_path / transcript}:2: not UTF-8 (byte 13)"]
    record(tmp_path / "a.wav", "one")
    table = tmp_path / "table.csv"
    table.write_bytes(b"file_name,QuestionText,answer\na.wav,What?,caf\xe9\na.wav,Wh\xe9re?,here\na.wav,Who?,Ren\xc3\xa9\n")
    corpus = data.load(table)
    assert [row.text for row in corpus] == ["René"]
    assert [str(problem) for problem in corpus.problems] == [
        f"{table}:2: answer is not UTF-8 (byte 4)",
        f"{table}:3: QuestionText is not UTF-8 (byte 3)",
    ]
    table.write_bytes(b"file_name,QuestionText,caf\xe9\n")
    with pytest.raises(ValueError, match=r"needs columns .*, got file_name, QuestionText, caf\ufffd$"):
        data.load({"path": table, "kind": "clotho_aqa"})


def test_a_csv_field_or_a_name_past_the_limit_is_a_bad_row(tmp_path: Path) -> None:
    record(tmp_path / "a.wav", "one")
    table = tmp_path / "table.csv"
    table.write_text(f"file_name,QuestionText,answer\na.wav,{'x' * 140_000},no\na.wav,Who?,me\n")
    corpus = data.load(table)
    assert [row.text for row in corpus] == ["me"]
    assert [str(problem) for problem in corpus.problems] == [f"{table}:2: not CSV (field larger than field limit (131072))"]
    table.write_text(f"file_name,QuestionText,answer\n{'x' * 300}.wav,What?,no\na.wav,Who?,me\n")
    assert [problem.where for problem in data.load(table).problems] == [f"{table}:2"]
    table.write_text("x" * 140_000)
    with pytest.raises(ValueError, match="no kind of corpus takes"):
        data.load(table)


def test_huggingface_forms_of_audio(tmp_path: Path) -> None:
    paths = [record(tmp_path / f"{word}.wav", word) for word in ("one", "two", "three")]
    expected = [data.load_audio(path) for path in paths]
    forms = {
        "paths": datasets.Dataset.from_dict({"audio": [str(path) for path in paths] + [None]}).cast_column(
            "audio", datasets.Audio(decode=False)
        ),
        "bytes": datasets.Dataset.from_list([{"audio": {"bytes": path.read_bytes(), "path": None}} for path in paths] + [{"audio": None}]),
        "arrays": datasets.Dataset.from_list(
            [{"audio": {"array": speak(word).tolist(), "sampling_rate": 16000}} for word in ("one", "two", "three")] + [{"audio": None}]
        ),
        "strings": datasets.Dataset.from_dict({"audio": [str(path) for path in paths] + [None]}),
    }
    forms["decoded"] = forms["paths"].cast_column("audio", datasets.Audio(sampling_rate=8000))
    for name, dataset in forms.items():
        dataset = dataset.add_column("sentence", ["one", "two", None, "four"]).add_column("speaker", ["a", "b", "c", "d"])
        dataset.save_to_disk(tmp_path / name)
        corpus = data.load(tmp_path / name)
        assert [row.text for row in corpus] == ["one", "two", None], name
        assert [problem.where for problem in corpus.problems] == [f"{tmp_path / name}[3]"]
        assert corpus[1].extra == {"speaker": "b"} and corpus[1].id == "1"
        for row, samples in zip(corpus, expected, strict=True):
            assert np.abs(data.load_audio(row.audio) - samples).max() < 1e-4, name
        assert corpus.durations().tolist() == [0.5, 0.5, 0.5]


def test_huggingface_splits_selections_and_columns(tmp_path: Path) -> None:
    rows = [
        {"clip": {"bytes": record(tmp_path / f"{i}.wav", word).read_bytes(), "path": None}, "said": word}
        for i, word in enumerate(["one", "two"])
    ]
    dataset = datasets.Dataset.from_list([*rows, {"clip": None, "said": "three"}])
    shuffled = dataset.select([2, 1, 0])
    datasets.DatasetDict({"train": dataset, "test": shuffled}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="split must be one of train, test"):
        data.load(tmp_path / "set")
    with pytest.raises(ValueError, match="name it with audio_column"):
        data.load({"path": tmp_path / "set", "split": "test"})
    corpus = data.load({"path": tmp_path / "set", "split": "test", "audio_column": "clip", "text_column": "said"})
    assert [row.text for row in corpus] == ["two", "one"] and corpus.problems[0].where.endswith("[0]")
    shuffled.to_parquet(tmp_path / "parquet" / "train.parquet")
    corpus = data.load(
        {"kind": "huggingface", "path": str(tmp_path / "parquet"), "split": "train", "audio_column": "clip", "text_column": "said"}
    )
    assert [row.text for row in corpus] == ["two", "one"]
    assert len(data.load_audio(corpus[0].audio)) == 8000
    with pytest.raises(ValueError, match="text_column must be one of clip, said, got 'text'"):
        data.load({"path": tmp_path / "set", "split": "test", "audio_column": "clip", "text_column": "text"})
    with pytest.raises(ValueError, match="must hold audio as a path"):
        datasets.Dataset.from_dict({"audio": [1, 2]}).save_to_disk(tmp_path / "numbers")
        data.load(tmp_path / "numbers")


def hub_rows(tmp_path: Path, features: dict[str, Any] | None = None, **columns: Sequence[Any]) -> Path:
    """A saved data set of as many rows as the columns, with audio of its own type."""
    sound = record(tmp_path / "one.wav", "one").read_bytes()
    rows = len(next(iter(columns.values()), ())) or 2
    dataset = datasets.Dataset.from_dict({"audio": [{"bytes": sound, "path": None}] * rows, **columns}).cast_column(
        "audio", datasets.Audio()
    )
    for name, feature in (features or {}).items():
        dataset = dataset.cast_column(name, feature)
    dataset.save_to_disk(tmp_path / "set")
    return tmp_path / "set"


def test_a_huggingface_set_of_audio_alone_comes_to_an_end(tmp_path: Path) -> None:
    corpus = data.load(hub_rows(tmp_path))
    rows = iter(corpus)
    assert [next(rows).id, next(rows).id] == ["0", "1"] and next(rows, None) is None
    assert corpus[-1].id == "1"
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"row {index} of 2"):
            corpus[index]


@pytest.mark.parametrize(
    "column, values, said",
    [
        ("text", [1, None], "text must be a string, got 1"),
        ("sentence", [["one"], None], r"sentence must be a string, got \['one'\]"),
        ("prompt", [1, None], "prompt must be a string, got 1"),
        ("duration", ["1", None], "duration must be a number of seconds, 0 or more and at most 1000000000, got '1'"),
        ("duration", [float("nan"), 0.5], "duration must be a number of seconds, .*, got nan"),
        ("duration", [0.0, 0.5], "duration must be positive, got 0"),
        ("offset", ["1", None], "offset must be a number of seconds, 0 or more and at most 1000000000, got '1'"),
        ("offset", [-0.5, 0.5], "offset must be a number of seconds, .*, got -0.5"),
        ("answers", [["one", None], ["one"]], r"answers must be a list of strings, got \['one', None\]"),
        ("answers", [[{"text": "one"}], []], r"answers must be a list of strings, got \[{'text': 'one'}\]"),
        ("id", [1.5, None], "id must be a string or a whole number, got 1.5"),
    ],
)
def test_a_huggingface_row_is_checked_as_a_manifests(column: str, values: list[Any], said: str, tmp_path: Path) -> None:
    path = hub_rows(tmp_path, **({} if column == "sentence" else {"text": ["a", "b"]}) | {column: values})
    corpus = data.load(path)
    assert [row.where for row in corpus] == [f"{path}[1]"]
    (problem,) = corpus.problems
    assert problem.where == f"{path}[0]" and re.fullmatch(said, problem.reason)


def test_huggingface_rows_are_sections_where_they_say_so(tmp_path: Path) -> None:
    path = hub_rows(tmp_path, text=["a", "b", "c"], offset=[0.25, None, 0.0], duration=[0.125, 0.25, None], end=[1, 2, 3])
    corpus = data.load(path)
    assert corpus.problems == [] and [(row.offset, row.duration) for row in corpus] == [(0.25, 0.125), (0.0, 0.25), (0.0, None)]
    assert corpus[0].extra == {"end": 1} and corpus.durations().tolist() == [0.125, 0.25, 0.5]
    assert data.load(hub_rows(tmp_path / "whole", text=["a"], offset=[0.25])).durations().tolist() == [0.25]


def test_huggingface_answers_as_squad_has_them(tmp_path: Path) -> None:
    answers = [{"text": ["one", "1"], "answer_start": [3, 9]}, {"text": [], "answer_start": []}, None]
    corpus = data.load(hub_rows(tmp_path, answers=answers))
    assert [row.answers for row in corpus] == [("one", "1"), (), ()] and [row.text for row in corpus] == ["one", None, None]
    assert len(corpus.for_scoring()) == 1


def test_huggingface_class_labels_are_their_names(tmp_path: Path) -> None:
    path = hub_rows(tmp_path, {"text": datasets.ClassLabel(names=["no", "yes"])}, text=[1, None, 0, -1])
    corpus = data.load(path)
    assert [row.text for row in corpus] == ["yes", None, "no"]
    assert [str(problem) for problem in corpus.problems] == [f"{path}[3]: text must be a string, got -1"]


def test_other_audio_of_a_huggingface_row_is_left_alone(tmp_path: Path) -> None:
    clean = [{"bytes": b"no audio at all", "path": None}] * 2
    path = hub_rows(tmp_path, {"clean": datasets.Audio()}, text=["one", "two"], clean=clean, speaker=["a", "b"])
    assert [(row.text, row.extra) for row in data.load(path)] == [("one", {"speaker": "a"}), ("two", {"speaker": "b"})]


def test_a_huggingface_set_saved_in_a_format(tmp_path: Path) -> None:
    formatted = datasets.load_from_disk(hub_rows(tmp_path, text=["one", "two"], duration=[0.5, 0.25])).with_format("torch")
    formatted.save_to_disk(tmp_path / "formatted")
    assert [(row.text, row.duration) for row in data.load(tmp_path / "formatted")] == [("one", 0.5), ("two", 0.25)]


def test_a_text_of_a_huggingface_row_is_nothing_else(tmp_path: Path) -> None:
    corpus = data.load({"path": hub_rows(tmp_path, prompt=["one", "two"], text=["x", "y"]), "text_column": "prompt"})
    assert [(row.text, row.prompt) for row in corpus] == [("one", None), ("two", None)]


def test_a_huggingface_set_without_rows(tmp_path: Path) -> None:
    features = datasets.Features({"audio": datasets.Audio(), "text": datasets.Value("string")})
    empty = datasets.Dataset.from_dict({"audio": [], "text": []}, features=features)
    empty.save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="set has no rows"):
        data.load(tmp_path / "set")


def test_a_selection_in_memory_knows_which_rows_are_missing(tmp_path: Path) -> None:
    from steermoe.data.huggingface import _missing_audio

    dataset = datasets.Dataset.from_list([{"audio": "a.wav"}, {"audio": None}, {"audio": "b.wav"}]).select([1, 2, 1])
    assert _missing_audio(dataset, "audio").tolist() == [True, False, True]


def test_specifications(tmp_path: Path) -> None:
    record(tmp_path / "a.wav", "one")
    path = write_manifest(tmp_path, *({"audio_filepath": "a.wav", "text": str(i)} for i in range(4)), {"audio_filepath": "b.wav"})
    both = data.load([str(path), {"path": path, "first": 2, "prompt": "Say it."}])
    assert [row.text for row in both] == ["0", "1", "2", "3", "0", "1"] and both[-1].text == "1"
    assert [row.prompt for row in both] == [None] * 4 + ["Say it."] * 2
    assert len(both.problems) == 2
    assert [row.text for row in both[1:5]] == ["1", "2", "3", "0"]
    with pytest.raises(IndexError):
        both[6]


def test_specification_errors(tmp_path: Path) -> None:
    record(tmp_path / "a.wav", "one")
    path = write_manifest(tmp_path, {"audio_filepath": "gone.wav"})
    (tmp_path / "empty").mkdir()
    for spec, error, said in [
        (tmp_path / "gone", FileNotFoundError, "there is nothing at"),
        (
            tmp_path / "empty",
            ValueError,
            r"no kind of corpus takes .*; looked for(.|\n)*librispeech: a folder with \*.trans.txt(.|\n)*manifest: ",
        ),
        (tmp_path / "a.wav", ValueError, "no kind of corpus takes"),
        (
            {"path": path, "kind": "manifests"},
            ValueError,
            r"kind must be one of aishell, .*, got 'manifests' \(did you mean 'manifest'\?\)",
        ),
        ({"path": path, "audio_dirs": "x"}, ValueError, r"has no option 'audio_dirs'.*did you mean 'audio_dir'"),
        ({"kind": "manifest"}, ValueError, "a corpus needs 'path', got only 'kind'"),
        ({"path": path, "first": 0}, ValueError, "first must be a positive number of rows"),
        (path, ValueError, r"has no usable row: 1 bad ones\n.*manifest.jsonl:1: audio_filepath .*gone.wav is not there"),
        ({"path": path, "first": True}, ValueError, "first must be a positive number of rows"),
        ({"path": None}, TypeError, "a corpus's path must be a string, got None"),
        ({"path": path, "where": 3}, TypeError, r"where must be a mapping of fields to values, as in .*, got 3"),
        ({"path": path, "audio_dir": 3}, TypeError, "a corpus's audio_dir must be a string, got 3"),
        ({"path": path, "prompt": 3}, TypeError, "a corpus's prompt must be a string, got 3"),
        ({"path": path, "kind": ["manifest"]}, TypeError, r"a corpus's kind must be a string, got \['manifest'\]"),
        ({"path": tmp_path / "gone", "kind": "librispeech"}, FileNotFoundError, "there is nothing at"),
        ({"path": tmp_path, "kind": "librispeech"}, ValueError, "has no rows; looked for"),
        ([], ValueError, "at least one corpus"),
        (3, TypeError, "got int"),
    ]:
        with pytest.raises(error, match=said):
            data.load(spec)  # type: ignore[arg-type]


def test_a_kind_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module dropped into the package's folder, and nothing else, is a kind: found, told from the path, its options checked."""
    (tmp_path / "shouted.py").write_text(
        """
from steermoe.data.corpus import Corpus, Example, decoded, numbered_lines

PRIORITY, LOOKED_FOR = 10, "a .shout file"


def takes(path):
    return path.suffix == ".shout"


def read(path, *, times: int = 1, loud: bool = False, gain: float | None = None, only: tuple[int, ...] = ()):
    lines = [(number, decoded(line)) for number, line in numbered_lines(path)]
    return Corpus([Example("a.wav", text * times, where=f"{path}:{number}") for number, text in lines])
"""
    )
    path = tmp_path / "corpus.shout"
    path.write_bytes(b"\xef\xbb\xbfone\r\n \r\n two\n")
    monkeypatch.setattr(data, "__path__", [*data.__path__, str(tmp_path)])
    data._kinds.cache_clear()
    try:
        assert [(row.text, row.name) for row in data.load(path)] == [("one", f"{path}:1"), (" two", f"{path}:3")]
        options = {"times": 2, "loud": True, "gain": 1, "only": (1,)}
        assert data.load({"path": path, "kind": "shouted"} | options)[0].text == "oneone"
        for name, value, wanted in [
            ("times", "2", "a whole number"),
            ("times", True, "a whole number"),
            ("loud", 1, "true or false"),
            ("gain", "loud", "a number"),
        ]:
            with pytest.raises(TypeError, match=f"a corpus's {name} must be {wanted}, got {value!r}"):
                data.load({"path": path, name: value})
        with pytest.raises(ValueError, match=r"no kind of corpus takes(.|\n)*shouted: a \.shout file"):
            data.load(record(tmp_path / "a.wav", "one"))
    finally:
        monkeypatch.undo()
        data._kinds.cache_clear()
        sys.modules.pop(f"{data.__name__}.shouted", None)
        vars(data).pop("shouted", None)
    assert "shouted" not in data.kinds() and {"manifest", "librispeech", "aishell", "clotho_aqa", "huggingface"} <= set(data.kinds())


def test_of_two_kinds_that_take_a_path_the_higher_priority_reads_it(tmp_path: Path) -> None:
    record(tmp_path / "1-2-0000.flac", "one")
    (tmp_path / "1-2.trans.txt").write_text("1-2-0000 FROM THE TRANSCRIPT\n")
    write_manifest(tmp_path, {"audio_filepath": "1-2-0000.flac", "text": "from the manifest"})
    assert data.load(tmp_path)[0].text == "FROM THE TRANSCRIPT"
    assert data.load({"path": tmp_path, "kind": "manifest"})[0].text == "from the manifest"


@pytest.mark.skipif(not SPEECH.is_dir(), reason="no recorded speech beside the repository")
def test_recordings() -> None:
    corpus = data.load(SPEECH)
    assert len(corpus) == 2008 and corpus.problems == []
    assert len(corpus.for_training()) == 2006
    assert len(data.load({"path": SPEECH, "where": {"split": "test", "source": "fsdd"}})) == 200
    row = next(row for row in corpus if str(row.audio).endswith("jfk.flac"))
    assert soundfile.info(str(row.audio)).duration == row.duration
