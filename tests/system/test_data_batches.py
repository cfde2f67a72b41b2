"""Length buckets, and the collator: what reaches the model, and what becomes of rows that cannot."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from tones import ToneProcessor, record, speak

from steermoe import SteerMoEProcessor
from steermoe.data import BadRowLog, Collator, Corpus, Example, LengthBucketSampler, TooManyBadRows
from steermoe.data.bucketing import batches_by_length
from steermoe.data.collator import chat


def lengths(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 4.0, rows)


@pytest.mark.parametrize("rows, size", [(1, 1), (7, 8), (64, 8), (1003, 16), (0, 4)])
def test_every_row_once_an_epoch_and_another_order_the_next(rows: int, size: int) -> None:
    sampler = LengthBucketSampler(lengths(rows), size, seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert order == list(sampler)
        assert sorted(order) == list(range(rows)) and len(sampler) == rows
        assert all(type(index) is int for index in order)
        orders.append(order)
    if rows > 60:
        assert orders[0] != orders[1] != orders[2]
    assert orders[0] == list(LengthBucketSampler(lengths(rows), size, seed=3))
    if rows > 60:
        assert orders[0] != list(LengthBucketSampler(lengths(rows), size, seed=4))


def test_batches_hold_similar_lengths_and_stay_shuffled() -> None:
    seconds = lengths(4000)
    order = np.array(list(LengthBucketSampler(seconds, 16)))

    def padding(order: np.ndarray) -> float:
        batches = seconds[order].reshape(-1, 16)
        return float(1 - batches.sum() / (16 * batches.max(axis=1).sum()))

    assert padding(order) < 0.05 < 0.4 < padding(np.random.default_rng(0).permutation(4000))
    longest = seconds[order].reshape(-1, 16).max(axis=1)
    assert longest[0] == seconds.max()
    assert abs(np.corrcoef(longest[1:-1], longest[2:])[0, 1]) < 0.2


def test_the_short_batch_is_last_and_drops_other_rows_each_epoch() -> None:
    seconds = lengths(103)
    sampler = LengthBucketSampler(seconds, 10)
    dropped = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        batches = list(torch.utils.data.BatchSampler(sampler, 10, drop_last=True))
        assert len(batches) == 10
        dropped.append(frozenset(range(103)) - {index for batch in batches for index in batch})
    assert len(set(dropped)) == 5


def test_unknown_lengths_and_bad_arguments() -> None:
    sampler = LengthBucketSampler([1.0, float("nan"), 3.0], 2)
    assert sampler.lengths.tolist() == [1.0, 2.0, 3.0]
    for arguments in [([1.0], 0), ([[1.0]], 2)]:
        with pytest.raises(ValueError, match=r"must be"):
            LengthBucketSampler(*arguments)
    assert batches_by_length([1.0, 3.0, float("nan"), 2.0], 2) == [[2, 1], [3, 0]]


def test_resuming_and_two_processes_see_the_same_epoch() -> None:
    seconds = lengths(60)
    sampler = LengthBucketSampler(seconds, 8, seed=1)
    loader = Accelerator(cpu=True).prepare(torch.utils.data.DataLoader(list(range(60)), batch_size=4, sampler=sampler))
    loader.set_epoch(2)
    whole = [batch.tolist() for batch in loader]
    assert sampler.epoch == 2
    resumed = skip_first_batches(loader, 5)
    resumed.set_epoch(2)
    assert [batch.tolist() for batch in resumed] == whole[5:]
    halves = [
        list(BatchSamplerShard(torch.utils.data.BatchSampler(sampler, 4, drop_last=False), num_processes=2, process_index=rank))
        for rank in range(2)
    ]
    assert [batch for pair in zip(*halves, strict=True) for batch in pair][: len(whole) - 1] == whole[:-1]
    # Both processes' batches of one step come from one bucket.
    spreads = [np.ptp(seconds[[*a, *b]]) for a, b in zip(*halves, strict=True)]
    assert np.median(spreads) < np.ptp(seconds) / 4


def rows_of(tmp_path: Path, *texts: str | None, words: str = "one two") -> list[Example]:
    path = str(record(tmp_path / "good.wav", words))
    return [Example(path, text, id=f"row{index}", where=f"m:{index}") for index, text in enumerate(texts)]


def test_a_batch_has_a_chat_a_clip_and_an_answer_a_row(tmp_path: Path) -> None:
    processor = ToneProcessor()
    rows = rows_of(tmp_path, "one two", "two")
    rows[1] = Example(rows[1].audio, "two", prompt="What came <|audio|> last?", offset=0.5, duration=0.4)
    batch = Collator(processor, prompt="Write it down.")(rows)
    assert processor.calls[0]["messages"] == [chat("Write it down."), chat("What came <|audio|> last?")]
    assert processor.calls[0]["messages"][0] == [{"role": "user", "content": "<|audio|>Write it down."}]
    assert processor.calls[0]["answers"] == ["one two", "two"]
    assert batch["feature_lengths"].tolist() == [16000, 6400] and "labels" in batch
    assert np.array_equal(batch["input_features"][1, :6400].numpy(), batch["input_features"][0, 8000:14400].numpy())


def test_a_long_clip_becomes_several_placeholders(tmp_path: Path) -> None:
    processor = ToneProcessor()
    collator = Collator(processor)
    collator(rows_of(tmp_path, "words", words="one two three four five six seven eight nine " * 3))
    call = processor.calls[0]
    assert call["clips"] >= 3 and call["messages"][0][0]["content"].startswith("<|audio|>" * call["clips"])
    collator.max_seconds = 10.0
    with pytest.raises(ValueError, match="no row of the batch can be used"):
        collator(rows_of(tmp_path, "words", words="one two three four five six seven eight nine " * 3))
    assert "13.5 s of audio, and max_seconds is 10" in str(collator.bad_rows.errors[0])
    assert chat("<|audio|> then <|audio|>", 2)[0]["content"] == "<|audio|> then <|audio|>"
    with pytest.raises(ValueError, match=r"2 <\|audio\|> placeholders for 3 clips"):
        chat("<|audio|> then <|audio|>", 3)


def test_bad_rows_leave_the_batch_and_are_named_once(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "one", "two", None, "four")
    rows.insert(3, Example(rows[0].audio, "x", prompt="<|audio|> or <|audio|>?", where="m:8"))
    (tmp_path / "text.wav").write_text("not audio " * 100)
    rows[1] = Example(str(tmp_path / "text.wav"), "two", where="m:1")
    log = BadRowLog(tmp_path / "run" / "bad_rows.jsonl", limit=3)
    processor = ToneProcessor()
    collator = Collator(processor, bad_rows=log)
    for _ in range(3):
        collator(rows)
    assert processor.calls[-1]["answers"] == ["one", "four"]
    assert [problem.where for problem in log.errors] == ["m:1", "m:2", "m:8"]
    assert "not audio" in log.errors[0].reason and log.errors[1].reason == "no text to learn"
    assert "2 <|audio|> placeholders for 1 clips" in log.errors[2].reason
    entries = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [entry["severity"] for entry in entries] == ["error"] * 3
    with pytest.raises(TooManyBadRows, match=r"4 bad rows, and max_bad_rows allows 3(.|\n)*m:1: (.|\n)*m:9: .*does not exist"):
        collator([Example(str(tmp_path / "gone.wav"), "x", where="m:9")])


def test_texts_that_no_processor_takes_are_bad_rows(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "one", "smile \ud83d", "hear <|audio|>", "four")
    rows.append(Example(rows[0].audio, "five", prompt="\udc00?", where="m:4"))
    collator = Collator(ToneProcessor(), bad_rows=BadRowLog(tmp_path / "bad_rows.jsonl", limit=3))
    collator(rows)
    assert collator.processor.calls[-1]["answers"] == ["one", "four"]
    assert [str(problem) for problem in collator.bad_rows.errors] == [
        r"m:1: text holds a lone surrogate ('\ud83d' at character 7): half of a character",
        "m:2: text holds <|audio|>, which stands for audio in prompts: 'hear <|audio|>'",
        r"m:4: prompt holds a lone surrogate ('\udc00' at character 1): half of a character",
    ]
    collator.bad_rows.warn("\ud83d.wav", "odd")
    assert collator.bad_rows.warnings[0].where == "\ud83d.wav"


def test_rows_that_the_processor_refuses_are_bad_rows(tmp_path: Path, tiny_encoder: Path, tiny_language_model: Path) -> None:
    """Which of a batch it was, by name; the others are used, and so is none of them for a batch of nothing else."""
    processor = SteerMoEProcessor.from_backbones(tiny_encoder, tiny_language_model)
    processor.tokenizer.model_max_length = 200
    rows = rows_of(tmp_path, "one", "x" * 300, "three", "y" * 400, words="one")
    collator = Collator(processor, bad_rows=BadRowLog(limit=2), fallback=[rows[3], rows[2]])
    assert torch.equal(collator(rows)["labels"], collator([rows[0], rows[2]])["labels"])
    assert [problem.where for problem in collator.bad_rows.errors] == ["m:1", "m:3"]
    assert "comes to 3" in collator.bad_rows.errors[0].reason and "the language model takes 200" in collator.bad_rows.errors[0].reason
    assert torch.equal(collator([rows[1]])["labels"], collator([rows[2]])["labels"])
    collator.bad_rows.limit = 1
    with pytest.raises(TooManyBadRows, match=r"max_bad_rows allows 1(.|\n)*m:1: the chat comes to"):
        collator([Example(rows[0].audio, "z" * 500, where="m:9")])


def test_silent_and_clipped_rows_are_used_and_counted(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "one")
    for name, samples in [("silent", np.zeros(8000)), ("clipped", np.clip(9 * speak("one"), -1, 1))]:
        soundfile.write(tmp_path / f"{name}.wav", samples, 16000)
        rows.append(Example(str(tmp_path / f"{name}.wav"), name, where=name))
    collator = Collator(ToneProcessor(), bad_rows=BadRowLog(limit=0))
    assert len(collator(rows)["feature_lengths"]) == 3
    assert [(problem.where, problem.reason.split()[0]) for problem in collator.bad_rows.warnings] == [("silent",) * 2, ("clipped",) * 2]
    assert collator.bad_rows.errors == []


def test_a_batch_of_nothing_but_bad_rows_takes_one_from_the_corpus(tmp_path: Path) -> None:
    bad = Example(str(tmp_path / "gone.wav"), "x", where="gone")
    processor = ToneProcessor()
    collator = Collator(processor, fallback=Corpus([bad, *rows_of(tmp_path, "one")]))
    collator([bad])
    collator([bad, bad])
    # Once more the first time: whether the processor takes the row is asked before it stands in for others.
    assert [call["answers"] for call in processor.calls] == [["one"]] * 3
    assert len(collator.bad_rows.errors) == 1


def test_a_corpus_of_nothing_but_bad_rows_says_why(tmp_path: Path, tiny_encoder: Path, tiny_language_model: Path) -> None:
    """Here every text is past the language model's context."""
    processor = SteerMoEProcessor.from_backbones(tiny_encoder, tiny_language_model)
    processor.tokenizer.model_max_length = 200
    rows = rows_of(tmp_path, *["x" * 300] * 7, words="one")
    log = BadRowLog(tmp_path / "bad_rows.jsonl")
    with pytest.raises(ValueError, match=r"fallback has none that can: .*bad_rows\.jsonl has the 7 bad rows, and begins with\n") as error:
        Collator(processor, bad_rows=log, fallback=Corpus(rows))(rows[:2])
    listed = str(error.value).splitlines()[1:]
    assert len(listed) == 5 and all(f"m:{index}: the chat comes to 3" in line for index, line in enumerate(listed))


def test_workers_share_the_log_and_its_limit(tmp_path: Path) -> None:
    good = rows_of(tmp_path, *["one"] * 12)
    corpus = [row if index % 3 else Example(str(tmp_path / f"gone{index}.wav"), "x", where=f"m:{index}") for index, row in enumerate(good)]
    log = BadRowLog(limit=4)
    loader = torch.utils.data.DataLoader(corpus, batch_size=2, num_workers=2, collate_fn=Collator(ToneProcessor(), bad_rows=log))  # type: ignore[arg-type]
    for _ in range(2):
        assert sum(len(batch["feature_lengths"]) for batch in loader) == 8
    assert sorted(problem.where for problem in log.errors) == ["m:0", "m:3", "m:6", "m:9"]
    assert log.path.exists()
    log.limit = 3
    batches = iter(torch.utils.data.DataLoader(corpus, batch_size=2, num_workers=2, collate_fn=Collator(ToneProcessor(), bad_rows=log)))  # type: ignore[arg-type]
    with pytest.raises(TooManyBadRows, match="max_bad_rows allows 3"):
        list(batches)
    # Left to the garbage collector, torch waits five seconds for each worker.
    batches._shutdown_workers()


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    """As a process that is killed leaves it; what is recorded afterwards is not part of it."""
    log = BadRowLog(tmp_path / "bad_rows.jsonl")
    log.error("m:1", "first")
    log.error("m:2", "café")
    whole = log.path.read_bytes()
    for left in range(len(whole) - 1, whole.index(b"\n"), -1):
        log.path.write_bytes(whole[:left])
        again = BadRowLog(log.path)
        assert [problem.where for problem in again.errors][:1] == ["m:1"]
        again.warn("m:3", "third")
        again.error("m:2", "café")
        assert [str(problem) for problem in again.errors] == ["m:1: first", "m:2: café"] and len(again.warnings) == 1


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = BadRowLog(tmp_path / "run" / "bad_rows.jsonl", limit=2)
    log.error("m:1", "first")
    kept = log.path.read_bytes()
    log.path.unlink()
    log.path.mkdir()
    log.error("m:2", "second")
    log.warn("m:3", "third")
    assert [problem.where for problem in log.errors] == ["m:2"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{log.path} cannot be written (Is a directory): bad rows are counted, and no longer recorded there"
    ]
    log.path.rmdir()
    log.path.write_bytes(kept)
    assert [problem.where for problem in log.errors] == ["m:1", "m:2"] and [problem.where for problem in log.warnings] == ["m:3"]
    with pytest.raises(TooManyBadRows, match="3 bad rows"):
        log.error("m:4", "fourth")


def test_a_log_without_a_path_removes_its_file() -> None:
    log = BadRowLog()
    log.error("here", "why")
    path = log.path
    copy = pickle.loads(pickle.dumps(log))
    del copy
    assert path.exists()
    del log
    assert not path.exists()
    with pytest.raises(ValueError, match="limit must be 0 or more"):
        BadRowLog(limit=-1)
