"""What a recording says, however long it is, and answers to questions about it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .capacity import LEAST_ANSWER, capacity
from .data.audio import AudioSource, Loudness, duration_of, name_of, split_at_quiet
from .data.collator import TRANSCRIPTION_PROMPT
from .generation import Request, answer_limit, respond

SHORTEST_PIECE = 0.1
"""Seconds: of less there is no word to hear, and a model makes one up for every piece."""

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

    ``warnings`` say what looks wrong: audio that is silent or clipped, a text that is cut off.
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

    ``max_seconds`` is the longest piece, at most `longest_piece`'s and by default what it says; shorter ones make finer segments. Silent
    pieces (`data.audio.SILENT_PEAK`) get an empty text. ``generation`` goes to ``model.generate``, ``max_new_tokens`` cut to what the
    language model takes. Only one batch's pieces are in memory. AudioError as `data.load_audio`'s; ValueError for a ``max_seconds`` that
    cannot be taken, and for ``generation`` as `generation.answer_limit`'s.
    """
    begun = time.perf_counter()
    prompt = TRANSCRIPTION_PROMPT if prompt is None else prompt
    max_seconds = longest_piece(model, processor, prompt=prompt, max_seconds=max_seconds, **generation)
    sections = split_at_quiet(source, max_seconds)
    name = name_of(source)
    longest = max(sections, key=lambda section: section[1] - section[0])
    generation = capacity(model, processor, prompt).within(generation, [longest])
    requests = [Request(key, source, (section,), prompt, name, skip_silence=True) for key, section in enumerate(sections)]
    shown = f"transcribing {os.path.basename(name)}" if progress else None
    answered = respond(model, processor, requests, batch_size=batch_size, num_workers=num_workers, progress=shown, **generation)
    responses = {response.request.key: response for response in answered}
    segments = tuple(Segment(start, end, responses[key].text) for key, (start, end) in enumerate(sections))
    warnings = Loudness.joined(response.loudness for response in responses.values()).warnings
    if cut_off := [start for key, (start, _) in enumerate(sections) if responses[key].cut_off]:
        of = f"{len(cut_off)} of {len(sections)} segments, the first at {cut_off[0]:.1f} s,"
        warnings.append(f"cut off (the text of {of} had not ended after {answer_limit(generation)} tokens)")
    return Transcript(name, segments, sections[-1][1] - sections[0][0], time.perf_counter() - begun, tuple(warnings))


def longest_piece(model: Any, processor: Any, *, prompt: str | None = None, max_seconds: float | None = None, **generation: Any) -> float:
    """Seconds of the longest piece that `transcribe` makes with these arguments: what both encoder and language model take.

    Without ``max_seconds``, ``max_new_tokens`` or half of what the prompt leaves is kept for the text. ValueError for a ``max_seconds``
    that encoder or language model cannot take, or below `SHORTEST_PIECE`.
    """
    room = capacity(model, processor, TRANSCRIPTION_PROMPT if prompt is None else prompt)
    if max_seconds is None:
        return room.longest_clip(room.answer(generation))
    most = room.longest_clip(min(LEAST_ANSWER, room.answer(generation)))
    if not SHORTEST_PIECE <= max_seconds <= most:
        whose = "encoder" if most == room.clip_seconds else "language model"
        raise ValueError(f"max_seconds must be at least {SHORTEST_PIECE:g} and at most the {whose}'s {most:g}, got {max_seconds:g}")
    return max_seconds


def ask(model: Any, processor: Any, source: AudioSource, question: str, **generation: Any) -> str:
    """The model's answer to ``question`` about the audio; a long recording is given as several clips of one prompt.

    ``generation`` goes to ``model.generate``, ``max_new_tokens`` cut to what the language model takes. AudioError as `data.load_audio`'s;
    ValueError for an empty question, for a recording longer than the language model takes, and for ``generation`` as
    `generation.answer_limit`'s.
    """
    if not question.strip():
        raise ValueError("question must not be empty")
    room = capacity(model, processor, question)
    most = room.question_seconds(generation)
    if (seconds := duration_of(source)) > most:
        name = name_of(source)
        raise ValueError(f"{name} is {seconds:.1f} s long, and the language model takes {most:.1f} s with this question: ask about a part")
    sections = tuple(split_at_quiet(source, processor.max_seconds))
    request = Request(0, source, sections, question, name_of(source))
    return next(respond(model, processor, [request], batch_size=1, **room.within(generation, sections))).text


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
