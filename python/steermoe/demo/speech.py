"""Synthesised speech: espeak-ng through the library that the `espeakng-loader` wheel carries. No subprocess, no network.

`TRAINING_VOICES` and `HELD_OUT_VOICES` share neither a speaker variant nor, for a part of the held-out ones, an accent: what was trained on
the first has never heard the second. `augment` makes a synthesised clip sound as if recorded in a room, over a telephone, from afar.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import math
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["HELD_OUT_VOICES", "SAMPLING_RATE", "TRAINING_VOICES", "Utterance", "Voice", "augment", "synthesise", "utter"]

SAMPLING_RATE = 16000

_ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-us-nyc", "en-gb-scotland", "en-gb-x-gbclan")
_SPEAKERS = (
    "m1 m2 m4 m5 m6 m8 f1 f2 f4 f5 Alex Andy Annie Denis Gene Jacky Lee Marco Michael Mike adam anika aunty belinda benjamin boris "
    "caleb david ed edward grandma ian john linda max norbert pablo quincy robert shelby steph travis victor"
)
_HELD_OUT_ACCENTS = ("en-us", "en", "en-029", "en-gb-x-gbcwmd")
_HELD_OUT_SPEAKERS = "m3 m7 f3 Alicia Andrea Hugo paul rob zac steph3"


@dataclass(frozen=True)
class Voice:
    """An accent spoken by one of espeak-ng's speaker variants.

    ``rate`` in words a minute, 80 to 450; ``pitch`` and ``pitch_range`` 0 to 100, 50 being the variant's own.
    """

    accent: str = "en-us"
    speaker: str = "m1"
    rate: int = 175
    pitch: int = 50
    pitch_range: int = 50

    def __str__(self) -> str:
        return f"{self.accent}+{self.speaker}"

    def varied(self, rng: random.Random) -> Voice:
        """The same speaker at another rate, pitch and liveliness."""
        return replace(self, rate=rng.randint(130, 210), pitch=rng.randint(30, 70), pitch_range=rng.randint(25, 75))


@dataclass(frozen=True)
class Utterance:
    """``audio`` (samples,) float32 at `SAMPLING_RATE`; ``phonemes``: name and start in seconds, in order."""

    audio: np.ndarray
    phonemes: tuple[tuple[str, float], ...]


TRAINING_VOICES = tuple(Voice(accent, speaker) for accent, speaker in itertools.product(_ACCENTS, _SPEAKERS.split()))
HELD_OUT_VOICES = tuple(
    Voice(accent, speaker, rate=rate, pitch=pitch)
    for (accent, (rate, pitch)), speaker in zip(
        itertools.cycle(zip(_HELD_OUT_ACCENTS, ((165, 50), (180, 45), (150, 55), (170, 60)), strict=True)),
        _HELD_OUT_SPEAKERS.split(),
        strict=False,
    )
)
"""Ten voices nobody has been trained on, at fixed rates and pitches."""


def synthesise(text: str, voice: Voice = Voice(), sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """(samples,) float32 in [-1, 1] at ``sampling_rate`` Hz: ``text`` spoken by ``voice``, the same samples every time.

    RuntimeError without the `espeakng-loader` wheel; ValueError for a text with nothing to say, or a voice espeak-ng does not have.
    """
    audio = utter(text, voice).audio
    if sampling_rate == SAMPLING_RATE:
        return audio
    import soxr

    return soxr.resample(audio, SAMPLING_RATE, sampling_rate)


def utter(text: str, voice: Voice, pronounce: Callable[[str], str] | None = None) -> Utterance:
    """As `synthesise`, with when each phoneme begins. Errors as there.

    ``pronounce`` is given the text in espeak-ng's mnemonics (``"D@2 k'at"``) and returns what to say instead.
    """
    samples, rate, phonemes = _speak(text, voice, pronounce)
    import soxr

    audio = soxr.resample(samples.astype(np.float32) / 32768, rate, SAMPLING_RATE)
    return Utterance(audio, tuple((name, at / rate) for name, at in phonemes))


def augment(audio: np.ndarray, rng: random.Random) -> np.ndarray:
    """The clip as it might have been recorded: another level, a room's echo, a narrow band, noise. Same length, float32."""
    noise = np.random.default_rng(rng.getrandbits(63))
    out: np.ndarray = audio.astype(np.float32)
    if rng.random() < 0.3:  # a room: reflections that die away
        length = int(SAMPLING_RATE * rng.uniform(0.05, 0.3))
        echo = noise.standard_normal(length) * np.exp(-5.0 * np.arange(length) / length) * rng.uniform(0.02, 0.12)
        echo[0] = 1.0
        out = _convolve(out, echo)
    if rng.random() < 0.35:  # a telephone, or a microphone that favours some frequencies
        spectrum = np.fft.rfft(out)
        frequencies = np.fft.rfftfreq(len(out), 1 / SAMPLING_RATE)
        low, high = rng.uniform(0, 300), rng.choice((3400.0, 4000.0, 5500.0, 8000.0))
        gain = 1 / (1 + np.exp((low - frequencies) / 30)) / (1 + np.exp((frequencies - high) / 60))
        tilt = (np.maximum(frequencies, 50.0) / 1000) ** rng.uniform(-0.4, 0.4)
        out = np.fft.irfft(spectrum * gain * tilt, len(out))
    level = rng.uniform(0.02, 0.3) / (float(np.sqrt(np.mean(out**2))) + 1e-6)
    out = out * min(level, 0.99 / (float(np.abs(out).max()) + 1e-6))
    if rng.random() < 0.6:
        power = float(np.sqrt(np.mean(out**2)))
        hiss: np.ndarray = noise.standard_normal(len(out))
        if rng.random() < 0.5:  # rumble rather than hiss
            hiss = _convolve(hiss, np.exp(-np.arange(40) / rng.uniform(2, 12)))
            hiss /= hiss.std()
        out = out + hiss * power * 10 ** (-rng.uniform(8, 40) / 20)
    return out.astype(np.float32)


def _convolve(signal: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Linear convolution cut to the signal's length, through the Fourier transform."""
    size = 2 ** math.ceil(math.log2(len(signal) + len(kernel)))
    return np.fft.irfft(np.fft.rfft(signal, size) * np.fft.rfft(kernel, size), size)[: len(signal)]


# --- the library ------------------------------------------------------------------------------------------------------------------------


class _Event(ctypes.Structure):
    class _Id(ctypes.Union):
        _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    )


_SYNCHRONOUS, _PHONEME_EVENTS, _NO_EXIT = 2, 1, 0x8000
_UTF8, _READ_MNEMONICS = 1, 0x100
_RATE, _PITCH, _PITCH_RANGE = 1, 3, 4
_LIST_ENDS, _PHONEME = 0, 7


class _Espeak:
    """One loading of the library, for one utterance.

    What espeak-ng says depends on what it has said before: the phase of its oscillators and other globals carry over, and no call resets
    them. Unloading the library does. So it is loaded from a copy of its file, which nobody else in the process can hold open.
    """

    def __init__(self, path: str, data: bytes) -> None:
        self.library: Any = ctypes.CDLL(path)
        self.rate = self.library.espeak_Initialize(_SYNCHRONOUS, 0, data, _PHONEME_EVENTS | _NO_EXIT)
        if self.rate <= 0:
            raise RuntimeError(f"espeak-ng did not start with its data in {data.decode()}")
        # It has just seeded itself by the clock; a part of its noise comes from the C library's generator.
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        _libc.srand(1)
        self.samples: list[np.ndarray] = []
        self.phonemes: list[tuple[str, int]] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self.callback: Callable[..., int] = kind(self._receive)  # kept: the library holds only its address
        self.library.espeak_SetSynthCallback(self.callback)
        self.library.espeak_TextToPhonemes.restype = ctypes.c_char_p

    def speak(self, text: str, voice: Voice, pronounce: Callable[[str], str] | None) -> None:
        if self.library.espeak_SetVoiceByName(str(voice).encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice}")
        for parameter, value in ((_RATE, voice.rate), (_PITCH, voice.pitch), (_PITCH_RANGE, voice.pitch_range)):
            self.library.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode()
        if pronounce:
            encoded = f"[[{pronounce(self.mnemonics(encoded))}]]".encode()
        if self.library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8 | (_READ_MNEMONICS if pronounce else 0), None, None) != 0:
            raise RuntimeError(f"espeak-ng could not speak {text!r}")

    def mnemonics(self, encoded: bytes) -> str:
        """The text in phonemes of the voice that was set."""
        left, clauses = ctypes.c_char_p(encoded), []
        while left:
            clauses.append(self.library.espeak_TextToPhonemes(ctypes.byref(left), _UTF8, 0).decode())
        return " ".join(clauses)

    def close(self) -> None:
        self.library.espeak_Terminate()
        _libc.dlclose(self.library._handle)

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self.samples.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events[index].type != _LIST_ENDS:
            if events[index].type == _PHONEME:
                self.phonemes.append((events[index].id.string.decode(errors="replace"), events[index].sample))
            index += 1
        return 0


_libc = ctypes.CDLL(None)
_libc.dlclose.argtypes = (ctypes.c_void_p,)


def _speak(text: str, voice: Voice, pronounce: Callable[[str], str] | None) -> tuple[np.ndarray, int, list[tuple[str, int]]]:
    """int16 samples, their rate, and the phonemes with the sample at which each begins."""
    if not any(character.isalnum() for character in text):
        raise ValueError(f"there is nothing to say in {text!r}")
    espeak = _Espeak(*_files())
    try:
        espeak.speak(text, voice, pronounce)
    finally:
        espeak.close()
    return np.concatenate(espeak.samples), espeak.rate, espeak.phonemes


@lru_cache(maxsize=1)
def _files() -> tuple[str, bytes]:
    """A copy of the library of this process's own, and the folder of espeak-ng's data."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise RuntimeError("speech synthesis needs espeak-ng: pip install espeakng-loader (part of the extra `demo`)") from error
    folder = tempfile.mkdtemp(prefix="steermoe-espeak-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return shutil.copy(espeakng_loader.get_library_path(), folder), str(espeakng_loader.get_data_path()).encode()
