"""Synthesised speech: deterministic, as varied as asked for, and voices for measuring that nobody trains on."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason="speech synthesis needs the espeakng-loader wheel")

from steermoe.demo.speech import HELD_OUT_VOICES, SAMPLING_RATE, TRAINING_VOICES, Voice, augment, synthesise, utter

SENTENCE = "anna found the red book in the garden"


def test_the_same_samples_every_time_whatever_was_said_before() -> None:
    first = synthesise(SENTENCE, HELD_OUT_VOICES[0])
    synthesise("something else", TRAINING_VOICES[7])
    assert np.array_equal(first, synthesise(SENTENCE, HELD_OUT_VOICES[0]))
    assert first.dtype == np.float32 and 0.05 < np.abs(first).max() <= 1.0
    assert 1.0 < len(first) / SAMPLING_RATE < 5.0


def test_the_same_samples_in_another_process() -> None:
    code = "import sys, zlib; from steermoe.demo.speech import *; print(zlib.crc32(synthesise(sys.argv[1], HELD_OUT_VOICES[3]).tobytes()))"
    sums = {subprocess.run([sys.executable, "-c", code, SENTENCE], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(sums) == 1


def test_every_voice_speaks() -> None:
    for voice in TRAINING_VOICES[::5] + HELD_OUT_VOICES:
        audio = synthesise("the cat sat on the mat", voice)
        assert len(audio) > SAMPLING_RATE / 2 and audio.std() > 0.01, voice


def test_rate_and_pitch_are_heard() -> None:
    slow, fast = (len(synthesise(SENTENCE, Voice(rate=rate))) for rate in (120, 240))
    assert slow > 1.5 * fast

    def fundamental(pitch: int) -> float:
        audio = synthesise("aaah", Voice(pitch=pitch, pitch_range=0))
        audio = audio[len(audio) // 4 : 3 * len(audio) // 4]
        correlation = np.correlate(audio, audio, "full")[len(audio) :]
        return SAMPLING_RATE / (40 + int(correlation[40:400].argmax()))

    assert fundamental(90) > 1.2 * fundamental(10)


def test_another_sampling_rate() -> None:
    assert len(synthesise("hello", Voice(), 8000)) == pytest.approx(len(synthesise("hello", Voice())) / 2, abs=2)


def test_phonemes_come_in_order_within_the_clip() -> None:
    utterance = utter(SENTENCE, Voice())
    starts = [start for _, start in utterance.phonemes]
    assert starts == sorted(starts) and len(starts) > 20
    assert starts[0] >= 0 and starts[-1] <= len(utterance.audio) / SAMPLING_RATE


def test_a_text_may_be_pronounced_otherwise() -> None:
    heard: list[str] = []
    voice = Voice("en-us", "m1")
    plain = utter("the small cat. It sat", voice)
    same = utter("the small cat. It sat", voice, lambda mnemonics: heard.append(mnemonics) or mnemonics)  # type: ignore[func-returns-value]
    assert "k'at" in heard[0] and "s'at" in heard[0], "all clauses"
    other = [name.strip("',") for name, _ in utter("cat", voice, lambda mnemonics: mnemonics.replace("a", "E")).phonemes]
    assert other[:3] == ["k", "E", "t"]
    assert [name for name, _ in same.phonemes if "_" not in name] == [name for name, _ in plain.phonemes if "_" not in name]


def test_voices_for_measuring_are_never_trained_on() -> None:
    assert not {str(voice) for voice in HELD_OUT_VOICES} & {str(voice) for voice in TRAINING_VOICES}
    assert not {voice.speaker for voice in HELD_OUT_VOICES} & {voice.speaker for voice in TRAINING_VOICES}
    assert {voice.accent for voice in HELD_OUT_VOICES} - {voice.accent for voice in TRAINING_VOICES}
    assert len(HELD_OUT_VOICES) == 10


def test_augmentation_keeps_the_length_and_follows_the_seed() -> None:
    audio = synthesise(SENTENCE)
    variants = [augment(audio, random.Random(seed)) for seed in range(20)]
    assert all(variant.shape == audio.shape and variant.dtype == np.float32 and np.isfinite(variant).all() for variant in variants)
    assert np.array_equal(variants[3], augment(audio, random.Random(3)))
    assert len({variant.tobytes() for variant in variants}) > 15


@pytest.mark.parametrize(
    ("text", "voice", "words"),
    [(" .", Voice(), "nothing to say"), ("hello", Voice("en-xx", "m1"), "has no voice en-xx"), ("", Voice(), "nothing to say")],
)
def test_bad_input(text: str, voice: Voice, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        synthesise(text, voice)


def test_without_the_wheel_there_is_one_sentence() -> None:
    code = "import sys; sys.modules['espeakng_loader'] = None; from steermoe.demo.speech import synthesise; synthesise('hello')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install espeakng-loader" in run.stderr.splitlines()[-1]
