"""What a recording says, however long it is, and answers to questions about it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .data.audio import AudioSource, Loudness, name_of, split_at_quiet
from .data.collator import TRANSCRIPTION_PROMPT
from .generation import Request, respond

# Scripts written without spaces between words: pieces that meet in one are joined without a space.
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Segment:
    """Part of a recording, ``start`` to ``end`` in seconds, and its text."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """A recording's text. ``duration`` is of the audio, ``seconds`` what transcribing took; segments cover the audio in order.

    ``warnings`` say what looks wrong with the audio: silent, clipped.
    """

    source: str
    segments: tuple[Segment, ...]
    duration: float
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The segments' texts in one line."""
        return join_texts([segment.text for segment in self.segments])

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "text": self.text,
            "duration": self.duration,
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            "segments": [asdict(segment) for segment in self.segments],
        }

    def to_json(self) -> str:
        """One JSON object: source, text, duration, seconds, warnings, and segments with start, end and text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=2)

    def to_srt(self) -> str:
        """SubRip subtitles, one a segment with text, numbered from 1."""
        spoken = [segment for segment in self.segments if segment.text]
        cues = [f"{n}\n{timecode(s.start)} --> {timecode(s.end)}\n{s.text}\n" for n, s in enumerate(spoken, 1)]
        return "\n".join(cues)


def transcribe(
    model: Any,
    processor: Any,
    source: AudioSource,
    *,
    prompt: str | None = None,
    max_seconds: float | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    progress: bool = False,
    **generation: Any,
) -> Transcript:
    """Transcribe audio of any length: split at quiet places, pieces transcribed in batches, texts joined.

    ``max_seconds`` is the longest piece, at most and by default the encoder's longest input; shorter ones make finer segments. Silent
    pieces (`data.audio.SILENT_PEAK`) get an empty text. ``generation`` goes to ``model.generate``. Only one batch's pieces are in memory.
    AudioError as `data.load_audio`'s; ValueError for a ``max_seconds`` the encoder cannot take.
    """
    if max_seconds is None:
        max_seconds = processor.max_seconds
    elif not 0 < max_seconds <= processor.max_seconds:
        raise ValueError(f"max_seconds must be above 0 and at most the encoder's {processor.max_seconds:g}, got {max_seconds:g}")
    begun = time.perf_counter()
    sections = split_at_quiet(source, max_seconds)
    name = name_of(source)
    prompt = TRANSCRIPTION_PROMPT if prompt is None else prompt
    requests = [Request(key, source, (section,), prompt, name, skip_silence=True) for key, section in enumerate(sections)]
    shown = f"transcribing {os.path.basename(name)}" if progress else None
    answered = respond(model, processor, requests, batch_size=batch_size, num_workers=num_workers, progress=shown, **generation)
    responses = {response.request.key: response for response in answered}
    segments = tuple(Segment(start, end, responses[key].text) for key, (start, end) in enumerate(sections))
    warnings = Loudness.joined(response.loudness for response in responses.values()).warnings
    return Transcript(name, segments, sections[-1][1] - sections[0][0], time.perf_counter() - begun, tuple(warnings))


def ask(model: Any, processor: Any, source: AudioSource, question: str, **generation: Any) -> str:
    """The model's answer to ``question`` about the audio; a long recording is given as several clips of one prompt.

    ``generation`` goes to ``model.generate``. AudioError as `data.load_audio`'s; ValueError for an empty question.
    """
    if not question.strip():
        raise ValueError("question must not be empty")
    request = Request(0, source, tuple(split_at_quiet(source, processor.max_seconds)), question, name_of(source))
    return next(respond(model, processor, [request], batch_size=1, **generation)).text


def join_texts(texts: Sequence[str]) -> str:
    """Texts of successive pieces as one, a space between them unless both sides are of a script that has none; empty ones vanish."""
    joined = ""
    for text in texts:
        text = text.strip()
        if joined and text and not (_UNSPACED.match(joined[-1]) and _UNSPACED.match(text[0])):
            joined += " "
        joined += text
    return joined


def timecode(seconds: float) -> str:
    """SubRip's HH:MM:SS,mmm, rounded to the nearest millisecond."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d},{milliseconds % 1000:03d}"
