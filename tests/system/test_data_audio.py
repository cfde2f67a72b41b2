"""Decoding: every kind of file to mono float32 at the asked rate, sections, errors, and cuts at quiet places."""

from __future__ import annotations

import os
import struct
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from tones import record, speak

from steermoe.data.audio import AudioError, blocks_of, duration_of, load_audio, read_audio, split_at_quiet

SPEECH = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "speech"


OPUS = {"format": "OGG", "subtype": "OPUS"}


def tone(seconds: float, rate: int, frequency: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_any_rate(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(1.5, rate), rate)
    samples = load_audio(tmp_path / "a.wav", 16000)
    assert samples.dtype == np.float32 and samples.shape == (round(round(1.5 * rate) * 16000 / rate),)
    assert np.abs(samples[:24000] - tone(1.5, 16000))[400:-400].max() < 2e-3


@pytest.mark.parametrize(
    "name, options, error",
    [
        ("a.wav", {"subtype": "PCM_16"}, 1e-4),
        ("a.wav", {"subtype": "PCM_24"}, 1e-6),
        ("a.wav", {"subtype": "FLOAT"}, 1e-7),
        ("a.wav", {"subtype": "PCM_U8"}, 1e-2),
        ("a.flac", {"subtype": "PCM_24"}, 1e-6),
        ("a.ogg", {}, 2e-2),
        ("a.mp3", {}, 2e-2),
    ],
)
def test_any_format(tmp_path: Path, name: str, options: dict[str, str], error: float) -> None:
    soundfile.write(tmp_path / name, tone(1.0, 16000), 16000, **options)
    samples = load_audio(tmp_path / name)
    assert len(samples) == 16000
    assert np.abs(samples - tone(1.0, 16000))[1000:-1000].max() < error
    assert np.array_equal(load_audio((tmp_path / name).read_bytes()), samples)


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    """Linux takes any bytes for a name; Python shows those that are no UTF-8 by surrogates."""
    path = tmp_path / os.fsdecode(b"\xff.wav")
    soundfile.write(tmp_path / "a.wav", tone(0.5, 16000), 16000)
    try:
        (tmp_path / "a.wav").rename(path)
    except OSError:
        pytest.skip("this file system takes only names that are text")
    for name in (path, str(path)):
        assert np.abs(load_audio(name, 16000) - tone(0.5, 16000)).max() < 1e-4


def test_stereo_is_the_mean_of_its_channels(tmp_path: Path) -> None:
    left, right = tone(1.0, 16000), tone(1.0, 16000, 1000.0)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    audio = read_audio(tmp_path / "a.wav")
    assert audio.channels == 2
    assert np.abs(audio.samples - (left + right) / 2).max() < 1e-6


def test_arrays() -> None:
    wave = tone(0.5, 8000)
    assert np.array_equal(load_audio((wave, 8000), 8000), wave)
    assert np.abs(load_audio(((wave * 32767).astype(np.int16), 8000), 8000) - wave).max() < 1e-4
    assert np.abs(load_audio((np.stack([wave, -wave]), 8000), 8000)).max() == 0
    for bad, said in [((wave.reshape(2, 2, -1), 8000), "shape"), ((wave, 0), "sampling rate"), ((wave[:0], 8000), "empty")]:
        with pytest.raises(AudioError, match=said):
            load_audio(bad)
    with pytest.raises(AudioError, match="finite"):
        load_audio((np.full(100, np.nan, np.float32), 8000))


def test_floats_at_the_scale_of_integers_are_refused(tmp_path: Path) -> None:
    """And a little over full scale, as decoders leave it, is not."""
    wave = tone(1.0, 16000)
    soundfile.write(tmp_path / "a.wav", wave * 32768, 16000, subtype="FLOAT")
    for source in (tmp_path / "a.wav", (wave * 32768, 16000)):
        with pytest.raises(AudioError, match=r" has a peak of 16384, and full scale is 1: divide it by 32768 if its samples are 16-bit"):
            load_audio(source)
        with pytest.raises(AudioError, match="has a peak of 16384"):
            list(blocks_of(source))
    assert np.array_equal(load_audio((wave * 3, 16000)), wave * 3)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.uint64])
def test_integers_in_a_type_too_wide_are_refused(dtype: type) -> None:
    """By its scale they would be silence; and what fills the type is not refused."""
    wave, unsigned = tone(0.5, 16000), np.dtype(dtype).kind == "u"
    narrow = (wave * 32767).astype(np.int16).astype(np.int64) + (32768 if unsigned else 0)
    with pytest.raises(
        AudioError, match=rf"^{np.dtype(dtype)} samples have a peak of \d+, and full scale is \d+: give 16-bit samples as u?int16$"
    ):
        load_audio((narrow.astype(dtype), 16000))
    filled = narrow.astype(dtype) * dtype(1 << (np.dtype(dtype).itemsize * 8 - 16))
    assert np.abs(load_audio((filled, 16000)) - wave).max() < 1e-4


def test_lists_of_integers_are_refused_and_digital_silence_is_none_of_them() -> None:
    with pytest.raises(
        AudioError, match="int64 samples have a peak of 300, and full scale is 9223372036854775808: give 16-bit samples as int16"
    ):
        load_audio(([0, 100, -300], 16000))  # type: ignore[arg-type]
    assert read_audio((np.zeros(100, np.int64), 16000)).loudness.silent
    assert not read_audio((np.full(100, 8192, np.int16), 16000)).loudness.silent


def test_channels_that_cancel_out_are_silent() -> None:
    """What is heard is their mean."""
    wave = tone(0.5, 8000)
    loudness = read_audio((np.stack([wave, -wave], axis=1), 8000), 8000).loudness
    assert loudness.peak > 0.49 and loudness.silent
    assert loudness.warnings == ["silent (its channels cancel each other out: their mean has a peak of 0.0e+00 of full scale)"]
    assert not read_audio((np.stack([wave, 0 * wave], axis=1), 8000), 8000).loudness.silent


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
@pytest.mark.parametrize("rate", [16000, 22050])
def test_a_section_is_what_the_whole_file_has_there(tmp_path: Path, name: str, rate: int) -> None:
    rng = np.random.default_rng(0)
    noise = np.convolve(rng.standard_normal(rate * 6), np.ones(16) / 16, "same").astype(np.float32)
    soundfile.write(tmp_path / name, 0.2 * noise, rate)
    whole = load_audio(tmp_path / name)
    section = load_audio(tmp_path / name, offset=2.0, duration=1.5)
    assert len(section) == 24000
    assert np.abs(section - whole[32000:56000]).max() < 1e-4
    assert len(load_audio(tmp_path / name, offset=5.0, duration=9.0)) == pytest.approx(16000, abs=2)
    with pytest.raises(AudioError, match=r"has 6\.\d+ s, and the section begins at 7\.00 s"):
        load_audio(tmp_path / name, offset=7.0)


def test_only_the_section_is_decoded(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", np.zeros(16000 * 600, np.int16), 16000)
    tracemalloc.start()
    load_audio(tmp_path / "long.wav", offset=500.0, duration=2.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_a_flac_without_its_length(tmp_path: Path) -> None:
    record(tmp_path / "a.flac", "one two three")
    data = bytearray((tmp_path / "a.flac").read_bytes())
    # STREAMINFO's total samples: the low 36 bits of bytes 18 to 25.
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    with pytest.raises(AudioError, match="does not say how long it is"):
        load_audio(bytes(data))


def test_errors_say_what_came(tmp_path: Path) -> None:
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is a transcript, not a recording\n" * 50)
    soundfile.write(tmp_path / "headed.wav", np.zeros(0), 16000)
    for name, said in [
        ("nothing.wav", "is empty: it has 0 bytes"),
        ("text.wav", "is not audio that soundfile reads"),
        ("headed.wav", "is empty or cut off"),
        ("missing.wav", "does not exist"),
        ("", "is not a file"),
    ]:
        with pytest.raises(AudioError, match=said) as error:
            load_audio(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(ValueError, match="duration positive"):
        load_audio(tmp_path / "text.wav", duration=0.0)


@pytest.mark.parametrize("kept", [0.5, 0.98])
@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg", "a.opus"])
def test_cut_off_files_are_errors(tmp_path: Path, name: str, kept: float) -> None:
    record(tmp_path / name, "one two three four five six seven eight nine " * 4, **OPUS if name == "a.opus" else {})
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(AudioError, match="cut off"):
        load_audio(tmp_path / name)


def pages(data: bytes) -> list[bytes]:
    """Of an Ogg file."""
    found = []
    while data:
        length = 27 + data[26] + sum(data[27 : 27 + data[26]])
        found.append(data[:length])
        data = data[length:]
    return found


@pytest.mark.parametrize("options", [{}, OPUS], ids=["vorbis", "opus"])
def test_an_ogg_file_is_whole_where_its_last_page_is_or_ends_a_stream(tmp_path: Path, options: dict[str, str]) -> None:
    data = record(tmp_path / "a.ogg", "one two three four five six seven eight nine " * 4, **options).read_bytes()
    other = record(tmp_path / "b.ogg", "one", **options).read_bytes()
    *most, last = pages(data)
    assert len(most) > 3 and len(load_audio(data)) > 16000
    # A second stream after the first; a tag, zeros, and what looks like a page without being one after the last.
    for more in (other, b"TAG" + bytes(125), bytes(300_000), b"OggS" * 3 + bytes(200), last[:-1]):
        assert len(load_audio(data + more)) == len(load_audio(data))
    for stopped in (b"".join(most), data + b"".join(pages(other)[:-1])):  # as by a recorder
        assert len(load_audio(stopped)) > 16000
    for cut in (b"".join(most) + last[:-1], b"".join(most) + last[:2], b"".join(most[:-1]) + bytes(300_000)):
        with pytest.raises(AudioError, match="is cut off: its last page is not whole"):
            load_audio(cut)


def test_the_whole_of_an_ogg_file_is_not_read_to_see_that_it_is_whole(tmp_path: Path) -> None:
    data = record(tmp_path / "a.ogg", "one").read_bytes()
    (tmp_path / "long.ogg").write_bytes(data[:-1] + bytes(30_000_000) + data)
    tracemalloc.start()
    assert duration_of(tmp_path / "long.ogg") > 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_stream_of_unknown_length_is_no_cut_off_file(tmp_path: Path) -> None:
    record(tmp_path / "a.wav", "one two")
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = struct.pack("<I", 0xFFFFFFFF)
    data[40:44] = struct.pack("<I", 0xFFFFFFFF)
    assert len(load_audio(bytes(data))) == 16000


def test_only_the_data_chunk_tells_whether_a_wav_file_is_whole(tmp_path: Path) -> None:
    record(tmp_path / "a.wav", "one two")
    data = (tmp_path / "a.wav").read_bytes()
    # Some writers count the header in the RIFF size; others put chunks of odd length before the data.
    assert len(load_audio(data[:4] + struct.pack("<I", len(data)) + data[8:])) == 16000
    odd = data[:12] + b"LIST" + struct.pack("<I", 5) + b"INFOx\0" + data[12:]
    assert len(load_audio(odd)) == 16000
    with pytest.raises(AudioError, match="cut off"):
        load_audio(odd[:-2])


def test_silent_and_clipped_are_noticed(tmp_path: Path) -> None:
    def warnings(samples: np.ndarray) -> list[str]:
        soundfile.write(tmp_path / "a.wav", samples, 44100)
        return [warning.split()[0] for warning in read_audio(tmp_path / "a.wav").loudness.warnings]

    assert warnings(np.zeros(44100)) == ["silent"]
    assert warnings(tone(1.0, 44100)) == []
    assert warnings(2 * tone(1.0, 44100)) == []
    assert warnings(np.clip(4 * tone(1.0, 44100), -1, 1)) == ["clipped"]
    # Two samples at full scale are a peak, three a flat top.
    assert warnings(np.tile([1.0, 1.0, 0.0, -1.0, -1.0, 0.0], 7350)) == []
    assert warnings(np.tile([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], 7350)) == ["clipped"]
    assert warnings(np.stack([np.clip(4 * tone(1.0, 44100), -1, 1), tone(1.0, 44100)], axis=1)) == ["clipped"]


def test_cuts_lie_in_pauses_and_cover_everything(tmp_path: Path) -> None:
    words = "one two three four five six seven eight nine " * 8
    path = record(tmp_path / "a.wav", words)
    sections = split_at_quiet(path, 5.0)
    assert sections[0][0] == 0 and sections[-1][1] == duration_of(path)
    assert all(left[1] == right[0] for left, right in pairwise(sections))
    assert all(0.4 < end - begin <= 5.0 for begin, end in sections)
    assert len(sections) <= 9
    samples = speak(words)
    for _, end in sections[:-1]:
        at = round(end * 16000)
        assert np.abs(samples[at - 800 : at + 800]).max() < 0.01


@pytest.mark.parametrize("frames", [3, 16_001, 44_101, 79_999, 80_000, 80_001, 80_002, 160_001])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_no_piece_is_longer_than_the_limit(frames: int, rate: int) -> None:
    rng = np.random.default_rng(frames)
    source = (rng.standard_normal(frames).astype(np.float32) * 0.1, rate)
    sections = split_at_quiet(source, 1.0)
    lengths = [len(load_audio(source, 16000, begin, end - begin)) for begin, end in sections]
    assert max(lengths) <= 16000
    assert sum(round((end - begin) * rate) for begin, end in sections) == frames


def test_sections_of_sections() -> None:
    source = (speak("one two three four five six seven eight nine"), 16000)
    sections = split_at_quiet(source, 1.0, offset=1.0, duration=2.5)
    assert sections[0][0] == 1.0 and sections[-1][1] == 3.5
    with pytest.raises(ValueError, match="max_seconds must be positive"):
        split_at_quiet(source, 0)
    with pytest.raises(AudioError, match="section begins at"):
        split_at_quiet(source, 1.0, offset=100.0)


def test_two_hours_without_loading_them(tmp_path: Path) -> None:
    rate = 4000
    with soundfile.SoundFile(tmp_path / "long.wav", "w", rate, 1, subtype="PCM_U8") as file:
        minute = np.zeros(60 * rate, np.float32)
        minute[: 50 * rate] = tone(50.0, rate)
        for _ in range(120):
            file.write(minute)
    tracemalloc.start()
    sections = split_at_quiet(tmp_path / "long.wav", 30.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sections[-1][1] == 7200.0
    assert 240 <= len(sections) <= 360
    # A third of a piece in float32, and what finding its quietest place takes; the whole file would be 115 MB.
    assert peak < 4_000_000


def test_blocks_are_the_file(tmp_path: Path) -> None:
    path = record(tmp_path / "a.wav", "one two three four five")
    blocks = list(blocks_of(path, 1.0))
    assert [len(block.samples) for block in blocks] == [16000, 16000, 8000]
    assert np.array_equal(np.concatenate([block.samples for block in blocks]), load_audio(path))


@pytest.mark.skipif(not SPEECH.is_dir(), reason="no recorded speech beside the repository")
def test_recordings() -> None:
    audio = read_audio(SPEECH / "read" / "jfk.flac")
    assert (audio.source_rate, audio.channels, len(audio.samples)) == (44100, 2, 176000)
    assert audio.loudness.warnings == []
    digit = read_audio(SPEECH / "fsdd" / "0_george_0.wav")
    assert digit.source_rate == 8000 and digit.seconds == pytest.approx(0.298, abs=1e-3)
    cuts = split_at_quiet(SPEECH / "read" / "jfk.flac", 5.0)
    assert cuts[-1][1] == 11.0 and max(end - begin for begin, end in cuts) <= 5.0
