"""Error rates against counts made by hand, and whole evaluations in which every row must reappear."""

from __future__ import annotations

import errno
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from rich.console import Console
from tones import ToneModel, ToneProcessor, record

from steermoe.data import Corpus, Example, Problem, TooManyBadRows
from steermoe.error_rates import bootstrap, language_code, normalizer
from steermoe.evaluation import Evaluation, evaluate, exact_match, word_errors

WORDS = ["one two three", "four", "five six seven eight nine zero " * 4, "yes", "no one two", "three four"]


def counts(rate: Any) -> tuple[int, int, int, int]:
    return rate.hits, rate.substitutions, rate.deletions, rate.insertions


def test_word_and_character_errors_by_hand() -> None:
    errors = word_errors(["the cat sat", "on a mat"], ["the bat sat down", "on mat"])
    assert counts(errors.wer) == (4, 1, 1, 1)
    assert errors.wer.rate == 3 / 6 and errors.wer.reference_length == 6
    assert errors.wer.utterance(0) == {"hits": 2, "substitutions": 1, "deletions": 0, "insertions": 1}
    # "the cat sat" to "the bat sat down": c to b, and " down" inserted; "a " deleted.
    assert counts(errors.cer) == (16, 1, 2, 5)
    assert errors.primary is errors.wer


def test_normalised_beside_raw() -> None:
    errors = word_errors(["Mr. Brown isn't here, he's got twenty dollars."], ["mister brown is not here he has got $20"])
    assert errors.raw_wer.rate > 0.5
    assert errors.wer.rate == 0.0
    basic = word_errors(["Schön, isn't it?"], ["schön isn t it"], "de")
    assert basic.language == "de" and basic.wer.rate == 0.0 and basic.raw_wer.rate > 0


@pytest.mark.parametrize("language", ["zh", "Chinese", "zh-CN", "mandarin", "ZH"])
def test_chinese_is_judged_by_characters(language: str) -> None:
    errors = word_errors(["而对楼市\uff0c成交。", "你好"], ["而 对 楼是 成交", "你 好 吗"], language)
    assert errors.language == "zh" and errors.primary is errors.cer
    assert counts(errors.cer) == (7, 1, 0, 1)
    assert errors.raw_cer.deletions == 2


def test_empty_references_and_hypotheses_count() -> None:
    errors = word_errors(["", "a cat", "", "dog"], ["noise here", "", "", "dog"])
    assert counts(errors.wer) == (1, 0, 2, 2) and errors.wer.rate == 4 / 3
    assert [errors.wer.utterance(index)["insertions"] for index in range(4)] == [2, 0, 0, 0]
    nothing = word_errors([""], [""])
    assert nothing.wer.rate == 0.0 and nothing.cer.interval == (0.0, 0.0)
    invented = word_errors([" ", "[noise]"], ["a b", "c"])
    assert math.isinf(invented.wer.rate) and invented.to_dict()["wer"]["rate"] is None
    json.dumps(invented.to_dict(), allow_nan=False)
    for arguments in ([], []), (["a"], []):
        with pytest.raises(ValueError, match="must"):
            word_errors(*arguments)


def test_corpus_rate_is_no_mean_of_rates() -> None:
    errors = word_errors(["one", "one two three four five six seven eight nine"], ["two", "one two three four five six seven eight nine"])
    assert errors.raw_wer.rate == 0.1


def test_english_numbers_are_joined_unless_told_otherwise() -> None:
    texts = ["one two three"], ["one two four"]
    assert word_errors(*texts).wer.rate == 1.0
    assert word_errors(*texts, normalization="basic").wer.rate == pytest.approx(1 / 3)
    assert word_errors(*texts, "de", normalization="english").wer.rate == 1.0
    with pytest.raises(ValueError, match="normalization must be english, basic or None"):
        word_errors(*texts, normalization="none")


def test_bootstrap_covers_and_repeats() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(100):
        lengths = rng.integers(5, 15, 200)
        low, high = bootstrap(rng.binomial(lengths, 0.1), lengths, seed=trial)
        inside += low <= 0.1 <= high
        assert 0 < high - low < 0.06
    assert 88 <= inside <= 100
    errors, lengths = np.array([0, 3, 1]), np.array([4, 5, 6])
    assert bootstrap(errors, lengths, seed=5) == bootstrap(errors, lengths, seed=5)
    assert bootstrap(np.array([2]), np.array([8])) == (0.25, 0.25)


def test_the_interval_is_over_reference_words() -> None:
    """Insertions are errors, and no reference words."""
    errors = word_errors(["one", "two"], ["one and more", "two and more"], normalization="basic")
    assert errors.wer.rate == 2.0 and errors.wer.interval == (2.0, 2.0)


def test_languages() -> None:
    assert [language_code(name) for name in ("English", "en-US", "de", "yue")] == ["en", "en", "de", "yue"]
    assert [language_code(name) for name in ("German", " mandarin ", "Khmer", "haw")] == ["de", "zh", "km", "haw"]
    assert normalizer("en")("  Colour, two ") == "color 2"
    for unknown in ("klingon", "", "e", "12"):
        with pytest.raises(
            ValueError, match=f"language must be a code like en, zh or yue, or an English name like German, got '{unknown}'"
        ):
            word_errors(["a"], ["a"], unknown)


def test_exact_match_is_of_the_whole_answer() -> None:
    match = exact_match(["Yes.", "a dog", "dog barks", "?", "no"], [("yes", "no"), ("cat", "A dog!"), ("dog",), ("!",), ("not",)])
    assert match.correct.tolist() == [True, True, False, False, False] and match.accuracy == 0.4
    assert match.interval[0] < 0.4 < match.interval[1]
    with pytest.raises(ValueError, match="as many"):
        exact_match(["a"], [])


def corpus_of(folder: Path, heard: list[str], texts: list[str] | None = None) -> Corpus:
    rows = []
    for index, words in enumerate(heard):
        path = record(folder / f"{index}.wav", words)
        text = words.strip() if texts is None else texts[index]
        rows.append(Example(str(path), text, id=f"u{index}", where=f"m:{index}", extra={"speaker": f"s{index % 2}"}))
    return Corpus(rows, name="tones")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_whole_corpus_in_its_order(tmp_path: Path, batch_size: int, num_workers: int) -> None:
    corpus = corpus_of(tmp_path, WORDS, ["one two three", "five", WORDS[2].strip(), "yes no", "one two", "three four"])
    model = ToneModel().train()
    output = tmp_path / "out" / "hypotheses.jsonl"
    result = evaluate(model, ToneProcessor(), corpus, batch_size=batch_size, num_workers=num_workers, output=output, normalization="basic")
    assert model.training
    assert [row.hypothesis for row in result.hypotheses] == [words.strip() for words in WORDS]
    assert result.errors is not None and counts(result.errors.wer) == (32, 1, 1, 1)
    assert result.rows == 6 and result.problems == [] and result.match is None
    assert result.audio_seconds == pytest.approx(0.5 * 34)
    assert result.real_time_factor == pytest.approx(result.seconds / 17.0) and result.seconds > 0
    # The long clip took several pieces; with them there are more prompts than rows.
    assert sum(model.batches) > 6 and max(model.batches) <= batch_size
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"u{index}" for index in range(6)]
    assert lines[1] | {"seconds": 0} == {
        "id": "u1",
        "audio": str(tmp_path / "1.wav"),
        "reference": "five",
        "hypothesis": "four",
        "errors": {"hits": 0, "substitutions": 1, "deletions": 0, "insertions": 0},
        "duration": 0.5,
        "seconds": 0,
        "extra": {"speaker": "s1"},
    }
    assert not list(output.parent.glob("*.partial"))
    printed = io.StringIO()
    Console(width=200, file=printed).print(result)
    assert "6 of 6" in printed.getvalue() and "8.82%" in printed.getvalue()
    json.dumps(result.to_dict(), allow_nan=False)


def test_rows_that_cannot_be_scored_are_named(tmp_path: Path) -> None:
    good = corpus_of(tmp_path, ["one", "two"])
    (tmp_path / "text.wav").write_text("no audio " * 50)
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), 16000)
    rows = [
        good[0],
        Example(str(tmp_path / "text.wav"), "three", id="broken", where="m:9"),
        Example(str(tmp_path / "0.wav"), None, id="null", where="m:10"),
        Example(str(tmp_path / "silent.wav"), "three", id="silent", where="m:11"),
        good[1],
    ]
    corpus = Corpus(rows, [Problem("m:12", "not JSON")], "tones")
    model = ToneModel()
    result = evaluate(model, ToneProcessor(), corpus, output=tmp_path / "h.jsonl")
    assert [row.hypothesis for row in result.hypotheses] == ["one", "", "two"]
    assert sum(model.batches) == 2
    assert result.rows == 6 and [problem.where for problem in result.problems] == ["m:12", "m:10", "m:9"]
    assert [problem.where for problem in result.warnings] == ["m:11"]
    assert result.errors is not None and counts(result.errors.wer) == (2, 0, 1, 0)
    lines = [json.loads(line) for line in (tmp_path / "h.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and "not audio" in lines[-1]["problem"]
    with pytest.raises(TooManyBadRows, match="2 bad rows in tones, and max_bad_rows allows 1"):
        evaluate(model, ToneProcessor(), corpus, max_bad_rows=1)
    with pytest.raises(TooManyBadRows):
        evaluate(model, ToneProcessor(), corpus, max_bad_rows=2)
    with pytest.raises(ValueError, match="no row of tones could be scored: m:9: "):
        evaluate(model, ToneProcessor(), Corpus([rows[1]], name="tones"))
    with pytest.raises(ValueError, match="tones has no row to score: m:10: no text"):
        evaluate(model, ToneProcessor(), Corpus([rows[2]], name="tones"))


@pytest.mark.parametrize("answers", [(), ("one",)], ids=["transcription", "question"])
@pytest.mark.parametrize("duration", [None, 0.5])
def test_a_section_past_the_end_is_named_as_one(tmp_path: Path, duration: float | None, answers: tuple[str, ...]) -> None:
    path = record(tmp_path / "a.wav", "one")
    rows = [Example(str(path), "one", answers=answers, where="m:1")]
    rows += [Example(str(path), "one", answers=answers, offset=offset, duration=duration, where=f"m:{offset}") for offset in (0.5, 1e4)]
    result = evaluate(ToneModel(), ToneProcessor(), Corpus(rows, name="tones"))
    assert [row.hypothesis for row in result.hypotheses] == ["one"]
    assert [str(problem) for problem in result.problems] == [
        f"m:0.5: {path} has 0.50 s, and the section begins at 0.50 s",
        f"m:10000.0: {path} has 0.50 s, and the section begins at 10000.00 s",
    ]


def test_scores_outlive_a_disk_that_is_full_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Evaluation, path: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Evaluation, "write_jsonl", full)
    with pytest.raises(OSError, match="No space left") as caught:
        evaluate(ToneModel(), ToneProcessor(), corpus_of(tmp_path, ["one", "two"]), output=tmp_path / "h.jsonl")
    result = caught.value.evaluation  # type: ignore[attr-defined]
    assert [row.hypothesis for row in result.hypotheses] == ["one", "two"] and result.errors is not None


def test_an_output_that_cannot_be_written_is_found_first(tmp_path: Path) -> None:
    model = ToneModel()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        evaluate(model, ToneProcessor(), corpus_of(tmp_path, ["one"]), output=tmp_path / "file" / "h.jsonl")
    (tmp_path / "h.jsonl.partial").mkdir()
    with pytest.raises(OSError, match=r"h\.jsonl\.partial"):
        evaluate(model, ToneProcessor(), corpus_of(tmp_path, ["one"]), output=tmp_path / "h.jsonl")
    assert not model.batches


def test_texts_that_are_no_unicode_are_written(tmp_path: Path) -> None:
    result = evaluate(ToneModel(), ToneProcessor(), corpus_of(tmp_path, ["one"], ["one \ud800"]), output=tmp_path / "h.jsonl")
    assert result.errors is not None
    assert json.loads((tmp_path / "h.jsonl").read_text(encoding="utf-8"))["reference"] == "one \ud800"


def test_questions_get_all_pieces_in_one_prompt(tmp_path: Path) -> None:
    rows = [
        Example(str(record(tmp_path / "a.wav", "yes")), "yes", prompt="Is it?", answers=("Yes!", "maybe"), id="a"),
        Example(str(record(tmp_path / "b.wav", "no")), "yes", prompt="Is it?", answers=("yes",), id="b"),
        Example(str(record(tmp_path / "c.wav", WORDS[2])), "long", prompt="What?", answers=(WORDS[2],), id="c"),
    ]
    processor = ToneProcessor()
    result = evaluate(ToneModel(), processor, Corpus(rows), output=tmp_path / "h.jsonl")
    assert result.task == "question" and result.errors is None and result.match is not None
    assert result.match.correct.tolist() == [True, False, True]
    assert any(call["messages"][0][0]["content"].count("<|audio|>") > 1 for call in processor.calls)
    assert json.loads((tmp_path / "h.jsonl").read_text().splitlines()[1])["correct"] is False
    printed = io.StringIO()
    Console(width=200, file=printed).print(result)
    assert "66.67%" in printed.getvalue()
    as_text = evaluate(ToneModel(), ToneProcessor(), Corpus(rows), task="transcription")
    assert as_text.errors is not None
    with pytest.raises(ValueError, match="task must be one of transcription, question or None, got 'asr'"):
        evaluate(ToneModel(), processor, Corpus(rows), task="asr")
    with pytest.raises(ValueError, match="output must be a file, and"):
        evaluate(ToneModel(), processor, Corpus(rows), output=tmp_path)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(ToneModel(), processor, Corpus(rows), batch_size=0)


def test_a_corpus_with_some_questions_is_one_of_questions(tmp_path: Path) -> None:
    """Rows without answers are right where they say their text."""
    rows = [
        Example(str(record(tmp_path / "a.wav", "one")), "one", id="a"),
        Example(str(record(tmp_path / "b.wav", "yes")), "yes", prompt="Is it?", answers=("yes", "no"), id="b"),
    ]
    result = evaluate(ToneModel(), ToneProcessor(), Corpus(rows))
    assert result.task == "question" and result.match is not None and result.match.correct.tolist() == [True, True]


def test_a_question_about_silence_is_asked(tmp_path: Path) -> None:
    """Only a transcript of silence is known to be empty."""
    soundfile.write(tmp_path / "silent.wav", np.zeros(8000), 16000)
    model = ToneModel()
    silent = Example(str(tmp_path / "silent.wav"), "nothing", prompt="What is heard?", answers=("nothing",), where="m:1")
    result = evaluate(model, ToneProcessor(), Corpus([silent]))
    assert model.batches == [1] and len(result.hypotheses) == 1
    assert [problem.where for problem in result.warnings] == ["m:1"]


def test_generation_options_and_prompts_reach_the_model(tmp_path: Path) -> None:
    processor = ToneProcessor()
    result = evaluate(ToneModel(), processor, corpus_of(tmp_path, ["one two three"]), prompt="Write.", max_new_tokens=2)
    assert result.hypotheses[0].hypothesis == "one two"
    assert processor.calls[0]["messages"][0][0]["content"] == "<|audio|>Write."
