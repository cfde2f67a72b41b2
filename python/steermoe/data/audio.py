"""Audio as mono float32 at the encoder's rate: decoding by soundfile, resampling by soxr, and cutting long recordings at quiet places."""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import soundfile
import soxr

# A path, an encoded file's bytes, or (samples (time,) or (time, channels), sampling rate in Hz).
HeldAudio: TypeAlias = "str | os.PathLike[str] | bytes | tuple[np.ndarray, int]"


@runtime_checkable
class StoredAudio(Protocol):
    """Audio kept in a table, read when it is needed; ``name`` is for messages."""

    name: str

    def fetch(self) -> HeldAudio: ...


AudioSource: TypeAlias = "HeldAudio | StoredAudio"

# Quieter than -60 dB of full scale at its loudest: nothing that could be understood.
SILENT_PEAK = 1e-3
# Full scale is 1. Decoders and resamplers overshoot by a few dB; +12 dB is no audio of that scale, and of 16-bit integers' scale all but
# what is silent is far above it.
LOUDEST_PEAK = 4.0
# Clipping leaves flat tops: runs of one value at full scale. A few are harmless; one sample in a thousand is heard.
CLIPPED_LEVEL = 0.98
CLIPPED_RUN = 3
CLIPPED_SHARE = 1e-3
# Compressed formats count their frames roughly: up to this much may be missing without the file being cut off.
MISSING_SECONDS = 0.1
# libsndfile's figure for a length that the header leaves open is the largest integer; no file has this many frames.
UNKNOWN_FRAMES = 1 << 48
UNKNOWN_BYTES = 0x7FFF_0000
# An Ogg page has a header of 27 bytes, a table of up to 255 sizes, and as many times up to 255 bytes.
OGG_PAGE_BYTES = 27 + 255 + 255 * 255
OGG_END_OF_STREAM = 0x04
# Each byte with its bits in the other order.
MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
# Read on either side of a section before resampling, so that the filter meets the same samples as in the whole file.
MARGIN_SECONDS = 0.05
# Energy is averaged over this long when looking for a quiet place: longer than a stop consonant's closure, shorter than a pause.
QUIET_SECONDS = 0.2


class AudioError(ValueError):
    """Audio that cannot be used: not there, not audio, empty, cut off. The message names the file."""


class Loudness(NamedTuple):
    """How loud audio is, 1.0 being full scale.

    ``peak``: the largest absolute value of any channel before mixing; ``mixed_peak``: of their mean, which is what is heard. ``flat`` of
    ``frames`` lie in flat tops.
    """

    peak: float
    mixed_peak: float
    flat: int
    frames: int

    @classmethod
    def of(cls, raw: np.ndarray) -> Loudness:
        """Of (time, channels) float32 at the file's own rate: resampling rounds flat tops off."""
        magnitude = np.abs(raw)
        peak = float(magnitude.max(initial=0.0))
        mixed_peak = float(np.abs(raw.mean(axis=1)).max(initial=0.0))
        if peak < CLIPPED_LEVEL or len(raw) < CLIPPED_RUN:
            return cls(peak, mixed_peak, 0, len(raw))
        # Sample t + 1 at full scale and equal to sample t; two such in a row are a run of three.
        equal = (raw[1:] == raw[:-1]) & (magnitude[1:] >= CLIPPED_LEVEL)
        return cls(peak, mixed_peak, int((equal[1:] & equal[:-1]).any(axis=1).sum()), len(raw))

    @classmethod
    def joined(cls, parts: Iterable[Loudness]) -> Loudness:
        """Of several pieces taken together."""
        peaks, mixed_peaks, flat, frames = zip(*parts, strict=True)
        return cls(max(peaks), max(mixed_peaks), sum(flat), sum(frames))

    @property
    def silent(self) -> bool:
        return self.mixed_peak < SILENT_PEAK

    @property
    def warnings(self) -> list[str]:
        """What is wrong with audio that is usable all the same: "silent (...)", "clipped (...)"."""
        found = []
        if self.silent and self.peak >= SILENT_PEAK:
            found.append(f"silent (its channels cancel each other out: their mean has a peak of {self.mixed_peak:.1e} of full scale)")
        elif self.silent:
            found.append(f"silent (its peak is {self.peak:.1e} of full scale)")
        if self.flat > CLIPPED_SHARE * self.frames:
            found.append(f"clipped ({self.flat / self.frames:.1%} of the samples lie in flat tops)")
        return found


@dataclass(frozen=True)
class Audio:
    """Decoded audio: ``samples`` (time,) float32 mono at ``sampling_rate`` Hz; ``source_rate`` and ``channels`` are the file's own."""

    samples: np.ndarray
    sampling_rate: int
    source_rate: int
    channels: int
    loudness: Loudness

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sampling_rate


def load_audio(source: AudioSource, sampling_rate: int = 16000, offset: float = 0.0, duration: float | None = None) -> np.ndarray:
    """Mono samples of ``source``, (time,) float32 at ``sampling_rate`` Hz; full scale is 1.0.

    ``offset`` and ``duration``, in seconds, pick a section, and only that is decoded; ``duration`` None is up to the end. AudioError for
    a source that is missing, not audio, empty, cut off, far over full scale or of integers in far too wide a type, and for a section that
    the audio does not have.
    """
    return read_audio(source, sampling_rate, offset, duration).samples


def read_audio(source: AudioSource, sampling_rate: int = 16000, offset: float = 0.0, duration: float | None = None) -> Audio:
    """`load_audio` with what was found on the way: the file's rate and channels, and its loudness."""
    if sampling_rate < 1:
        raise ValueError(f"sampling_rate must be a positive number of Hz, got {sampling_rate}")
    if offset < 0 or (duration is not None and duration <= 0):
        raise ValueError(f"offset must be 0 or more and duration positive, got {offset} and {duration} seconds")
    with _opened(source) as file:
        rate, frames = file.samplerate, _frames(source, file)
        begin = round(offset * rate)
        if begin >= frames:
            raise AudioError(f"{name_of(source)} has {frames / rate:.2f} s, and the section begins at {offset:.2f} s")
        end = frames if duration is None else min(begin + max(round(duration * rate), 1), frames)
        margin = round(MARGIN_SECONDS * rate) if rate != sampling_rate else 0
        # Begun where a sample of the source meets one of the result, so that the result lies on the whole file's grid.
        step = rate // math.gcd(rate, sampling_rate)
        first = max(begin - margin, 0) // step * step
        raw = _read(source, file, first, min(end + margin, frames))
        section = raw[begin - first : end - first]
        if len(section) == 0:
            raise AudioError(f"{name_of(source)} is empty: it has no samples")
        samples = _resample(raw.mean(axis=1), rate, sampling_rate)
        skip = round((begin - first) * sampling_rate / rate)
        samples = samples[skip : skip + max(round(len(section) * sampling_rate / rate), 1)]
        if len(samples) == 0:
            raise AudioError(f"{name_of(source)} is too short: {len(section)} samples at {rate} Hz")
        return Audio(np.ascontiguousarray(samples), sampling_rate, rate, raw.shape[1], Loudness.of(section))


def duration_of(source: AudioSource) -> float:
    """Seconds of audio in ``source``, from its header. AudioError as `load_audio`'s."""
    with _opened(source) as file:
        return _frames(source, file) / file.samplerate


def split_at_quiet(
    source: AudioSource, max_seconds: float, offset: float = 0.0, duration: float | None = None
) -> list[tuple[float, float]]:
    """Sections (start, end), in seconds, none longer than ``max_seconds``, that cover ``source`` without gap or overlap.

    Each cut lies where the energy is about the least within the last third before the limit, so that words are rarely cut.
    Only those thirds are decoded, one at a time. A source that fits is one section. ``offset`` and ``duration`` as in `load_audio`.
    """
    if max_seconds <= 0:
        raise ValueError(f"max_seconds must be positive, got {max_seconds}")
    with _opened(source) as file:
        rate, frames = file.samplerate, _frames(source, file)
        start = round(offset * rate)
        if start >= frames:
            raise AudioError(f"{name_of(source)} has {frames / rate:.2f} s, and the section begins at {offset:.2f} s")
        stop = frames if duration is None else min(start + max(round(duration * rate), 1), frames)
        # Rounded down, so that a section resampled is never a sample longer than the limit.
        longest = int(max_seconds * rate)
        if longest < 1:
            raise ValueError(f"max_seconds must be at least one sample, 1/{rate} s, got {max_seconds}")
        sections = []
        while stop - start > longest:
            # What is left over is never a sliver: a fragment of a word says nothing.
            latest = min(start + longest, stop - longest // 10)
            earliest = min(start + longest - longest // 3, latest)
            cut = earliest + _quietest(_read(source, file, earliest, latest).mean(axis=1), rate)
            cut = min(max(cut, start + 1), start + longest)
            sections.append((start / rate, cut / rate))
            start = cut
        return [*sections, (start / rate, stop / rate)]


def blocks_of(source: AudioSource, seconds: float = 30.0, offset: float = 0.0, duration: float | None = None) -> Iterator[Audio]:
    """The audio block by block at its own rate, so that hours of it need no more memory than ``seconds``. AudioError as `load_audio`'s."""
    with _opened(source) as file:
        rate, frames = file.samplerate, _frames(source, file)
        start, block = round(offset * rate), max(round(seconds * rate), 1)
        if start >= frames:
            raise AudioError(f"{name_of(source)} has {frames / rate:.2f} s, and the section begins at {offset:.2f} s")
        stop = frames if duration is None else min(start + max(round(duration * rate), 1), frames)
        for begin in range(start, stop, block):
            raw = _read(source, file, begin, min(begin + block, stop))
            if len(raw):
                yield Audio(np.ascontiguousarray(raw.mean(axis=1)), rate, rate, raw.shape[1], Loudness.of(raw))


def name_of(source: AudioSource) -> str:
    """How messages call ``source``."""
    if isinstance(source, StoredAudio):
        return source.name
    if isinstance(source, bytes):
        return f"audio of {len(source)} bytes"
    if isinstance(source, tuple):
        return f"an array of shape {np.shape(source[0])}"
    return os.fspath(source)


class _Samples:
    """An array with the part of ``soundfile.SoundFile``'s interface that is read here."""

    def __init__(self, samples: Any, sampling_rate: int) -> None:
        array = np.asarray(samples)
        if array.ndim not in (1, 2) or array.dtype.kind not in "fiu":
            raise AudioError(f"samples must be (time,) or (time, channels) numbers, got shape {array.shape} of {array.dtype}")
        if array.ndim == 2 and array.shape[0] < array.shape[1]:
            array = array.T
        if array.dtype.kind in "iu":
            if narrow := _narrow_integers(array):
                raise AudioError(narrow)
            limits = np.iinfo(array.dtype)
            middle = 0 if limits.min < 0 else (limits.max + 1) // 2
            array = (array.astype(np.float32) - middle) / (limits.max + 1 - middle)
        self._array = array.astype(np.float32, copy=False)[:, None] if array.ndim == 1 else array.astype(np.float32, copy=False)
        self._at = 0
        self.samplerate = int(sampling_rate)
        self.frames, self.channels = self._array.shape
        self.format = "ARRAY"
        if self.samplerate < 1:
            raise AudioError(f"the sampling rate of an array must be positive, got {sampling_rate}")

    def seek(self, frame: int) -> None:
        self._at = frame

    def read(self, frames: int, **_: Any) -> np.ndarray:
        return self._array[self._at : self._at + frames]


@contextmanager
def _opened(source: AudioSource) -> Iterator[Any]:
    """``source`` opened for reading, with at least one frame. AudioError, in words, where that cannot be."""
    name = name_of(source)
    held = source.fetch() if isinstance(source, StoredAudio) else source
    if isinstance(held, tuple):
        samples = _Samples(*held)
        if samples.frames == 0:
            raise AudioError(f"{name} is empty: it has no samples")
        yield samples
        return
    size = _size(held, name)
    try:
        # As bytes: soundfile encodes a name as it likes, and a name may be of bytes that are no text.
        file = soundfile.SoundFile(io.BytesIO(held) if isinstance(held, bytes) else os.fsencode(held))
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name} is not audio that soundfile reads ({error.error_string.rstrip('.')})") from error
    with file:
        if _wav_is_cut_off(held, size, file.format):
            raise AudioError(f"{name} is cut off: its header declares more than the {size} bytes that are there")
        if _ogg_is_cut_off(held, size, file.format):
            raise AudioError(f"{name} is cut off: its last page is not whole")
        if file.frames == 0:
            raise AudioError(f"{name} is empty or cut off: it has a header and no samples")
        yield file


def beginning(source: AudioSource, size: int) -> bytes:
    """The first ``size`` bytes of ``source`` as it is stored, by which it is known again; none of what cannot be read."""
    try:
        held = source.fetch() if isinstance(source, StoredAudio) else source
        if isinstance(held, tuple):
            return np.ascontiguousarray(held[0]).tobytes()[:size]
        if isinstance(held, bytes):
            return held[:size]
        with open(held, "rb") as file:
            return file.read(size)
    except OSError:
        return b""


def _size(source: str | os.PathLike[str] | bytes, name: str) -> int:
    if isinstance(source, bytes):
        size = len(source)
    elif not os.path.exists(source):
        raise AudioError(f"{name} does not exist")
    elif not os.path.isfile(source):
        raise AudioError(f"{name} is not a file")
    else:
        size = os.path.getsize(source)
    if size == 0:
        raise AudioError(f"{name} is empty: it has 0 bytes")
    return size


def _wav_is_cut_off(source: str | os.PathLike[str] | bytes, size: int, kind: str) -> bool:
    """Whether the data chunk declares more than is there: libsndfile takes what is there of a WAV file without a word.

    Sizes near 2^31 and 2^32 are what streams write for "unknown".
    """
    if kind not in ("WAV", "WAVEX"):
        return False
    with _raw(source) as file:
        form = "<4sI" if file.read(12)[:4] == b"RIFF" else ">4sI"
        while len(header := file.read(8)) == 8:
            name, length = struct.unpack(form, header)
            if name == b"data":
                return 0 < length < UNKNOWN_BYTES and length > size - file.tell()
            file.seek(length + length % 2, os.SEEK_CUR)
    return False


def _ogg_is_cut_off(source: str | os.PathLike[str] | bytes, size: int, kind: str) -> bool:
    """Whether the last whole page ends no stream and something follows it: libsndfile takes the whole pages without a word.

    Looked for from the end, as what follows the end of a stream is passed over. A file that ends with a page, as a recorder that was
    stopped leaves it, is taken for whole.
    """
    if kind != "OGG":
        return False
    with _raw(source) as file:
        span = 0
        while span < size:
            span = min(max(OGG_PAGE_BYTES, 4 * span), size)
            file.seek(size - span)
            tail = file.read(span)
            at = tail.rfind(b"OggS")
            while at >= 0:
                if (page := _ogg_page(tail[at : at + OGG_PAGE_BYTES])) is not None:
                    return not page[5] & OGG_END_OF_STREAM and at + len(page) < span
                at = tail.rfind(b"OggS", 0, at)
    return False


def _ogg_page(data: bytes) -> bytes | None:
    """The Ogg page that ``data`` begins with; None if it is not a whole one, as its checksum tells. Its header type is byte 5."""
    if len(data) < 27:
        return None
    sizes = data[27 : 27 + data[26]]
    length = 27 + data[26] + sum(sizes)
    if len(data) < length:
        return None
    page = data[:length]
    # The checksum, its own field 0, is CRC-32's polynomial from the highest bit down and from 0: zlib's, of mirrored bits and complemented.
    checked = page[:22] + bytes(4) + page[26:]
    found = zlib.crc32(checked.translate(MIRRORED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return page if int(f"{found:032b}"[::-1], 2) == int.from_bytes(page[22:26], "little") else None


def _raw(source: str | os.PathLike[str] | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def _frames(source: AudioSource, file: Any) -> int:
    """How many frames the file has. AudioError where it does not say: libsndfile cannot read such FLAC files to their end."""
    if file.frames >= UNKNOWN_FRAMES:
        raise AudioError(f"{name_of(source)} does not say how long it is (written to a pipe?): convert it once, as by ffmpeg -i OLD NEW")
    return file.frames


def _read(source: AudioSource, file: Any, begin: int, end: int) -> np.ndarray:
    """Frames ``begin`` to ``end``, (time, channels) float32. AudioError if they cannot be decoded or are not there."""
    try:
        file.seek(begin)
        raw = file.read(end - begin, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"{name_of(source)} is damaged or cut off ({error.error_string.rstrip('.')})") from error
    allowed = 0 if file.format == "ARRAY" else MISSING_SECONDS * file.samplerate
    if end - begin - len(raw) > allowed:
        raise AudioError(
            f"{name_of(source)} is cut off: {(begin + len(raw)) / file.samplerate:.2f} s can be decoded, and its header declares "
            f"{file.frames / file.samplerate:.2f} s"
        )
    if not np.isfinite(raw).all():
        raise AudioError(f"{name_of(source)} holds samples that are not finite numbers")
    if (peak := float(np.abs(raw).max(initial=0.0))) > LOUDEST_PEAK:
        raise AudioError(f"{name_of(source)} {wrong_scale(peak)}")
    return raw


def wrong_scale(peak: float) -> str:
    """What is said of floating point audio whose ``peak`` is past `LOUDEST_PEAK`."""
    return f"has a peak of {peak:.0f}, and full scale is 1: divide it by 32768 if its samples are 16-bit integers in floating point"


def _narrow_integers(array: np.ndarray) -> str | None:
    """What is said of integers in a type of more than twice their width, as lists become: by that type's scale they would be silence."""
    width = 8 * array.dtype.itemsize
    signed = array.dtype.kind == "i"
    peak = max(int(array.max(initial=0)), -int(array.min(initial=0)))
    # Digital silence is that on every scale with a sign.
    if width < 32 or (signed and peak == 0) or peak > (1 << (width // 2 - signed)):
        return None
    scale = 1 << (width - 1)
    return f"{array.dtype} samples have a peak of {peak}, and full scale is {scale}: give 16-bit samples as {'' if signed else 'u'}int16"


def _resample(mono: np.ndarray, rate: int, sampling_rate: int) -> np.ndarray:
    if rate == sampling_rate:
        return mono.astype(np.float32, copy=False)
    return soxr.resample(mono.astype(np.float32, copy=False), rate, sampling_rate, quality="HQ")


def _quietest(mono: np.ndarray, rate: int) -> int:
    """The middle of the quietest `QUIET_SECONDS` of ``mono``, as an index; the latest of those about as quiet."""
    hop = max(round(0.01 * rate), 1)
    frames = len(mono) // hop
    if frames < 2:
        return len(mono)
    power = np.square(mono[: frames * hop].astype(np.float64)).reshape(frames, hop).mean(axis=1)
    window = min(round(QUIET_SECONDS / 0.01), frames)
    total = np.concatenate([[0.0], np.cumsum(power)])
    windows = (total[window:] - total[:-window]) / window
    # Pauses differ by their noise alone: of those within 3 dB of the quietest, or silent, the latest makes the longest piece.
    best = int(np.flatnonzero(windows <= max(2 * windows.min(), SILENT_PEAK**2 / 2))[-1])
    return best * hop + window * hop // 2
