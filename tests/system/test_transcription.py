"""Recordings of any length to text, JSON and subtitles, and questions about them."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny_models
import torch
import transformers
from tiny_backbones import ENCODERS, noise
from tones import WORDS as WORD_TOKENS
from tones import ToneModel, ToneProcessor, record, speak

from steermoe import SteerMoEProcessor
from steermoe.capacity import capacity
from steermoe.data import AudioError, Corpus, Example
from steermoe.evaluation import evaluate
from steermoe.generation import Request, respond
from steermoe.transcription import Segment, Transcript, ask, join_texts, longest_piece, timecode, transcribe

WORDS = "one two three four five six seven eight nine zero yes no"


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("repeats", [1, 7])
def test_no_word_is_lost_however_long(tmp_path: Path, repeats: int, rate: int) -> None:
    words = " ".join([WORDS] * repeats)
    transcript = transcribe(ToneModel(), ToneProcessor(), record(tmp_path / "a.flac", words, rate), batch_size=3)
    assert transcript.text == words
    assert transcript.duration == pytest.approx(6.0 * repeats, abs=1e-3)
    assert transcript.segments[0].start == 0 and transcript.segments[-1].end == transcript.duration
    assert all(left.end == right.start for left, right in zip(transcript.segments, transcript.segments[1:], strict=False))
    assert len(transcript.segments) > repeats and transcript.seconds > 0


def test_stereo_and_shorter_pieces(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([speak(WORDS)] * 2, axis=1), 16000, subtype="PCM_24")
    model = ToneModel()
    transcript = transcribe(model, ToneProcessor(), str(tmp_path / "a.wav"), max_seconds=1.5, batch_size=2)
    assert transcript.text == WORDS and len(transcript.segments) >= 4
    assert max(segment.end - segment.start for segment in transcript.segments) <= 1.5
    assert max(model.batches) == 2
    for wrong in (0, -1.0, 0.001, 5.1):
        with pytest.raises(ValueError, match=r"max_seconds must be at least 0\.1 and at most the encoder's 5"):
            transcribe(model, ToneProcessor(), tmp_path / "a.wav", max_seconds=wrong)


def test_silence_is_not_given_to_the_model(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.concatenate([speak("one two"), np.zeros(12 * 16000, np.float32), speak("three")]), 16000)
    model = ToneModel()
    transcript = transcribe(model, ToneProcessor(), tmp_path / "a.wav")
    assert transcript.text == "one two three"
    assert sum(model.batches) < len(transcript.segments)
    soundfile.write(tmp_path / "b.wav", np.zeros(16000), 16000)
    assert transcribe(model, ToneProcessor(), tmp_path / "b.wav").segments == (Segment(0.0, 1.0, ""),)
    assert transcript.warnings == ()
    assert transcribe(model, ToneProcessor(), tmp_path / "b.wav").warnings[0].startswith("silent")


def test_a_text_that_is_cut_off_is_warned_of(tmp_path: Path) -> None:
    model = ToneModel()
    model.generation_config = transformers.GenerationConfig(eos_token_id=[WORD_TOKENS.index("no"), 99], pad_token_id=0)  # type: ignore[assignment]
    silence = np.zeros(4 * 16000, np.float32)
    parts = [speak("one two three four"), silence, speak("one two no"), silence, speak("yes"), silence, speak("four three two one")]
    soundfile.write(tmp_path / "a.wav", np.concatenate(parts), 16000)
    segments = transcribe(model, ToneProcessor(), tmp_path / "a.wav").segments
    assert transcribe(model, ToneProcessor(), tmp_path / "a.wav").warnings == ()
    for batch_size in (1, 8):
        transcript = transcribe(model, ToneProcessor(), tmp_path / "a.wav", max_new_tokens=3, batch_size=batch_size)
        assert transcript.text == "one two three one two no yes four three two"
        assert transcript.warnings == (
            f"cut off (the text of 2 of {len(segments)} segments, the first at 0.0 s, had not ended after 3 tokens)",
        )
    assert transcript.to_dict()["warnings"] == [*transcript.warnings]


def test_a_language_model_that_ends_its_turn_is_not_cut_off(tiny_encoder: Path, tiny_language_model: Path, tmp_path: Path) -> None:
    model, processor = tiny_models.build(tiny_encoder, tiny_language_model)
    soundfile.write(tmp_path / "a.wav", noise(1.0, 1), 16000)
    assert transcribe(model, processor, tmp_path / "a.wav", max_new_tokens=4).warnings == (
        "cut off (the text of 1 of 1 segments, the first at 0.0 s, had not ended after 4 tokens)",
    )
    every = list(range(model.language_model.config.vocab_size))
    assert transcribe(model, processor, tmp_path / "a.wav", max_new_tokens=4, eos_token_id=every).warnings == ()
    assert transcribe(model, processor, tmp_path / "a.wav", max_new_tokens=1, eos_token_id=every).warnings == ()


def test_a_generation_config_is_gone_by(tiny_encoder: Path, tiny_language_model: Path, tmp_path: Path) -> None:
    model, processor = tiny_models.build(tiny_encoder, tiny_language_model)
    soundfile.write(tmp_path / "a.wav", noise(1.0, 1), 16000)
    asked: list[tuple[int, int, bool]] = []

    def generate(**options: Any) -> Any:
        tokens = made(**options)
        asked.append((tokens.shape[1], options["max_new_tokens"], options["do_sample"]))
        return tokens

    model.generate, made = generate, model.generate
    config = transformers.GenerationConfig(max_new_tokens=5, do_sample=True, temperature=5.0)
    torch.manual_seed(0)
    transcript = transcribe(model, processor, tmp_path / "a.wav", generation_config=config)
    assert transcript.warnings == ("cut off (the text of 1 of 1 segments, the first at 0.0 s, had not ended after 5 tokens)",)
    ask(model, processor, tmp_path / "a.wav", "What?", generation_config=transformers.GenerationConfig(max_new_tokens=6))
    transcribe(model, processor, tmp_path / "a.wav", generation_config=config, max_new_tokens=np.int64(3), do_sample=False)
    rows = Corpus([Example(str(tmp_path / "a.wav"), "yes", id="1")], name="asked")
    evaluate(model, processor, rows, generation_config=config)
    assert asked == [(5, 5, True), (6, 6, False), (3, 3, False), (5, 5, True)]
    assert config.max_new_tokens == 5 and longest_piece(model, processor, generation_config=config) == processor.max_seconds


@pytest.mark.parametrize(
    "how, said",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number of at least 1, got -1"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number of at least 1, got True"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number of at least 1, got 2.5"),
        ({"num_beams": 2, "num_return_sequences": 2}, "num_return_sequences must be 1, as one text a clip is returned, got 2"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate must be false, as one text a clip is returned"),
        ({"max_length": 30}, "max_length counts the prompt and its audio, got 30: give max_new_tokens, which counts the answer alone"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(reversed(value)),
)
@pytest.mark.parametrize("as_config", [False, True])
def test_options_that_one_text_a_clip_cannot_go_by(how: dict[str, Any], said: str, as_config: bool, tmp_path: Path) -> None:
    options = {"generation_config": SimpleNamespace(**how)} if as_config else how
    path, model, processor = record(tmp_path / "a.wav", "yes"), ToneModel(), ToneProcessor()
    rows = Corpus([Example(str(path), "yes", id="1")], name="asked")
    for run in (
        lambda: transcribe(model, processor, path, **options),
        lambda: ask(model, processor, path, "What?", **options),
        lambda: evaluate(model, processor, rows, **options),
        lambda: list(respond(model, processor, [Request(0, str(path), ((0.0, 0.5),), "What?")], **options)),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            run()
    assert not processor.calls
    assert transcribe(model, processor, path, num_return_sequences=1, return_dict_in_generate=False).text == "yes"
    assert transcribe(model, processor, path, max_length=30, max_new_tokens=1).text == "yes"


def test_two_hours(tmp_path: Path) -> None:
    rate = 4000
    word = speak("seven", rate)
    with soundfile.SoundFile(tmp_path / "long.wav", "w", rate, 1, subtype="PCM_U8") as file:
        for minute in range(120):
            block = np.zeros(60 * rate, np.float32)
            at = (minute % 10) * 5 * rate + rate
            block[at : at + len(word)] = word
            file.write(block)
    processor = ToneProcessor()
    processor.max_seconds = 30.0
    tracemalloc.start()
    transcript = transcribe(ToneModel(), processor, tmp_path / "long.wav", batch_size=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert transcript.text.split() == ["seven"] * 120 and transcript.duration == 7200.0
    # Two hours at 16 kHz in float32 are 461 MB; four pieces of 30 s with their copies are a twentieth.
    assert peak < 40_000_000


def test_output_forms() -> None:
    segments = (Segment(0.0, 1.5, "hello there"), Segment(1.5, 62.0006, ""), Segment(62.0006, 3723.9996, "über uns"))
    transcript = Transcript("a.wav", segments, 3724.0, 2.0)
    assert transcript.text == "hello there über uns"
    assert transcript.to_srt() == ("1\n00:00:00,000 --> 00:00:01,500\nhello there\n\n2\n00:01:02,001 --> 01:02:04,000\nüber uns\n")
    parsed = json.loads(transcript.to_json())
    assert parsed["segments"][0] == {"start": 0.0, "end": 1.5, "text": "hello there"} and parsed["text"] == transcript.text
    assert "über" in transcript.to_json()
    assert Transcript("a.wav", (Segment(0.0, 1.0, ""),), 1.0, 0.1).to_srt() == ""


@pytest.mark.parametrize(
    "seconds, code",
    [(0, "00:00:00,000"), (0.9996, "00:00:01,000"), (59.9999, "00:01:00,000"), (3599.9999, "01:00:00,000"), (360000.25, "100:00:00,250")],
)
def test_timecodes(seconds: float, code: str) -> None:
    assert timecode(seconds) == code


def test_texts_are_joined_as_their_script_is_written() -> None:
    assert join_texts(["hello", " ", "", "there "]) == "hello there"
    assert join_texts(["你好", "世界。", "好"]) == "你好世界。好"
    assert join_texts(["你好", "world", "한국", "어"]) == "你好 world 한국 어"
    assert join_texts([]) == ""


def test_ask(tmp_path: Path) -> None:
    processor = ToneProcessor()
    assert ask(ToneModel(), processor, record(tmp_path / "a.wav", "yes"), "Is anyone there?") == "yes"
    assert processor.calls[0]["messages"] == [[{"role": "user", "content": "<|audio|>Is anyone there?"}]]
    assert ask(ToneModel(), processor, record(tmp_path / "b.wav", WORDS), "What?", max_new_tokens=20) == WORDS
    assert processor.calls[1]["clips"] == 2
    with pytest.raises(ValueError, match="question must not be empty"):
        ask(ToneModel(), processor, tmp_path / "a.wav", " ")


def test_unusable_audio_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("words " * 100)
    (tmp_path / "empty.wav").write_bytes(b"")
    record(tmp_path / "cut.mp3", WORDS)
    (tmp_path / "cut.mp3").write_bytes((tmp_path / "cut.mp3").read_bytes()[:9000])
    for name, said in [("text.wav", "is not audio"), ("empty.wav", "0 bytes"), ("cut.mp3", "cut off"), ("gone.wav", "does not exist")]:
        with pytest.raises(AudioError, match=said):
            transcribe(ToneModel(), ToneProcessor(), tmp_path / name)
        with pytest.raises(AudioError, match=said):
            ask(ToneModel(), ToneProcessor(), tmp_path / name, "What?")


# --- what the language model takes ---


def tokens(processor: Any, text: str, clips: list[np.ndarray]) -> int:
    """Of a prompt, as the processor makes it."""
    return processor(messages=tiny_models.user("<|audio|>" * len(clips) + text), audio=clips or None)["input_ids"].shape[1]


@pytest.fixture
def narrow(tiny_encoder: Path, tiny_language_model: Path) -> tuple[Any, SteerMoEProcessor]:
    """A model whose encoder takes 2 s, and whose language model 40 tokens besides the prompt "What?"."""
    model, processor = tiny_models.build(tiny_encoder, tiny_language_model)
    processor.tokenizer.model_max_length = tokens(processor, "What?", []) + 40
    return model.eval(), processor


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("pool_size", [1, 3])
def test_the_tokens_of_audio_are_those_of_the_processor(
    encoder_folder: Callable[[str], Path], tiny_language_model: Path, kind: str, pool_size: int
) -> None:
    model, processor = tiny_models.build(encoder_folder(kind), tiny_language_model, pool_size=pool_size)
    room = capacity(model, processor, "What?")
    assert room.tokens == 1024 - tokens(processor, "What?", [])
    for seconds in (0.2, 0.513, 1.0, 1.97):
        counted = tokens(processor, "What?", [noise(seconds, 1)]) - tokens(processor, "What?", [])
        assert counted <= room.tokens_of(seconds) <= counted + 1


def test_pieces_leave_the_language_model_room(narrow: tuple[Any, SteerMoEProcessor], tmp_path: Path) -> None:
    model, processor = narrow
    longest = longest_piece(model, processor, prompt="What?")
    clip = noise(longest, 1)
    assert 1.5 < longest < 2.0 and tokens(processor, "What?", [clip]) <= processor.tokenizer.model_max_length - 20
    assert longest_piece(model, processor, prompt="What?", max_new_tokens=5) == processor.max_seconds == 2.0
    soundfile.write(tmp_path / "a.wav", noise(5.3, 1), 16000)
    asked = []
    model.generate, generate = lambda **options: asked.append(options["max_new_tokens"]) or generate(**options), model.generate
    transcript = transcribe(model, processor, tmp_path / "a.wav", prompt="What?")
    assert transcript.segments[-1].end == pytest.approx(5.3) and len(transcript.segments) >= 4
    assert max(segment.end - segment.start for segment in transcript.segments) <= longest
    assert min(asked) >= 20 and max(asked) < 40
    with pytest.raises(ValueError, match=r"max_seconds must be at least 0\.1 and at most the language model's 1\.6, got 1\.9"):
        transcribe(model, processor, tmp_path / "a.wav", prompt="What?", max_seconds=1.9)
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, and the language model takes \d+: too few are left"):
        transcribe(model, processor, tmp_path / "a.wav", prompt="What is being said in this recording?")


def test_a_question_about_more_than_the_language_model_takes(narrow: tuple[Any, SteerMoEProcessor], tmp_path: Path) -> None:
    model, processor = narrow
    for seconds in (1.0, 3.0, 60.0):
        soundfile.write(tmp_path / f"{seconds:g}.wav", noise(seconds, 1), 16000)
    ask(model, processor, tmp_path / "1.wav", "What?")
    ask(model, processor, tmp_path / "3.wav", "What?", max_new_tokens=1)
    with pytest.raises(ValueError, match=r"60\.wav is 60\.0 s long, and the language model takes 1\.6 s with this question"):
        ask(model, processor, tmp_path / "60.wav", "What?")
    rows = [Example(str(tmp_path / f"{length}.wav"), "yes", prompt="What?", answers=("yes",), id=str(length)) for length in (1, 60)]
    result = evaluate(model, processor, Corpus(rows, name="asked"))
    assert [row.id for row in result.hypotheses] == ["1"]
    assert [problem.reason for problem in result.problems] == ["60.0 s of audio, and the language model takes 1.6 s with this question"]


def test_what_can_be_asked_can_be_evaluated(narrow: tuple[Any, SteerMoEProcessor], tmp_path: Path) -> None:
    """With the same limit on the answer, however long the other recordings are."""
    model, processor = narrow
    processor.tokenizer.model_max_length += 60
    asked: list[tuple[int, int]] = []
    model.generate, generate = (
        lambda **options: asked.append((len(options["input_ids"]), options["max_new_tokens"])) or generate(**options),
        model.generate,
    )
    rows, answers = [], []
    for index, seconds in enumerate((0.4, 2.7, 0.4, 5.0)):
        soundfile.write(tmp_path / f"{index}.wav", noise(seconds, index), 16000)
        rows.append(Example(str(tmp_path / f"{index}.wav"), "yes", prompt="What?", answers=("yes",), id=str(index)))
        answers.append(ask(model, processor, tmp_path / f"{index}.wav", "What?", max_new_tokens=70))
    alone, asked[:] = sorted(asked), []
    result = evaluate(model, processor, Corpus(rows, name="asked"), max_new_tokens=70)
    assert result.problems == [] and [row.hypothesis for row in result.hypotheses] == answers
    assert sorted({limit for _, limit in alone}) == sorted(limit for _, limit in asked) and sum(size for size, _ in asked) == 4
    assert min(asked)[1] < 50 and max(asked) == (2, 70)
