"""From examples to a batch that the model takes: decoding, prompts and features, in the DataLoader's workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..config import AUDIO_TOKEN
from .audio import AudioError, Loudness, read_audio, split_at_quiet
from .corpus import LISTED, BadRowLog, Example, lone_surrogate

TRANSCRIPTION_PROMPT = "Transcribe the speech."


class Collator:
    """``list[Example]`` to the processor's batch with labels: one chat a row, the prompt as user turn, the text as answer.

    A clip longer than ``processor.max_seconds`` is split at quiet places and its pieces stand one after the other in the prompt. A row
    that cannot be used (audio as in `load_audio`, no text, a text as in `text_fault`, longer than ``max_seconds``, a prompt as in `chat`,
    and what the processor refuses with a ValueError) is left out of its batch and recorded in ``bad_rows``, which aborts past its limit;
    silent and clipped clips are recorded as warnings and used. A batch of which nothing is left takes a row from ``fallback``, the corpus
    it comes from: in a distributed run every process has to have a batch. ValueError, naming the first bad rows, where that has none, too.
    """

    def __init__(
        self,
        processor: Any,
        *,
        prompt: str | None = None,
        bad_rows: BadRowLog | None = None,
        fallback: Sequence[Example] = (),
        max_seconds: float | None = None,
    ) -> None:
        self.processor = processor
        self.prompt = TRANSCRIPTION_PROMPT if prompt is None else prompt
        self.bad_rows = BadRowLog() if bad_rows is None else bad_rows
        self.fallback = fallback
        self.max_seconds = max_seconds
        self._spare: _Row | None = None

    def __call__(self, examples: Sequence[Example]) -> Any:
        rows = [row for example in examples if (row := self._prepare(example)) is not None]
        if rows:
            try:
                return self._processed(rows)
            except ValueError:
                # Which row it was shows when each is taken by itself: a text past the language model's context, for instance.
                rows = [row for row in rows if self._accepted(row)]
        return self._processed(rows or [self._spare_row()])

    def _processed(self, rows: Sequence[_Row]) -> Any:
        return self.processor(
            messages=[row.messages for row in rows],
            audio=[clip for row in rows for clip in row.clips],
            answers=[row.answer for row in rows],
        )

    def _accepted(self, row: _Row) -> bool:
        """Whether the processor takes the row; a line in ``bad_rows`` if it does not."""
        try:
            self._processed([row])
        except ValueError as error:
            self.bad_rows.error(row.name, str(error))
            return False
        return True

    def _prepare(self, example: Example) -> _Row | None:
        """What the processor gets of a row; None, and a line in ``bad_rows``, if it cannot be used."""
        if not (example.text and example.text.strip()):
            self.bad_rows.error(example.name, "no text to learn")
            return None
        if fault := text_fault(example):
            self.bad_rows.error(example.name, fault)
            return None
        try:
            sections = split_at_quiet(example.audio, self.processor.max_seconds, example.offset, example.duration)
            seconds = sections[-1][1] - sections[0][0]
            if self.max_seconds is not None and seconds > self.max_seconds:
                raise AudioError(f"{seconds:.1f} s of audio, and max_seconds is {self.max_seconds:g}")
            messages = chat(self.prompt if example.prompt is None else example.prompt, len(sections))
            clips = [read_audio(example.audio, self.processor.sampling_rate, begin, end - begin) for begin, end in sections]
        except ValueError as error:
            self.bad_rows.error(example.name, str(error))
            return None
        for warning in Loudness.joined(clip.loudness for clip in clips).warnings:
            self.bad_rows.warn(example.name, warning)
        return _Row(example.name, messages, [clip.samples for clip in clips], example.text)

    def _spare_row(self) -> _Row:
        if self._spare is None:
            prepared = (self._prepare(example) for example in self.fallback)
            self._spare = next((row for row in prepared if row is not None and self._accepted(row)), None)
        if self._spare is None:
            found = self.bad_rows.errors
            listed = "".join(f"\n  {problem}" for problem in found[:LISTED])
            raise ValueError(
                f"no row of the batch can be used, and fallback has none that can: {self.bad_rows.path} has the {len(found)} bad rows, and "
                f"begins with{listed}"
            )
        return self._spare


class _Row(NamedTuple):
    name: str
    messages: list[dict[str, str]]
    clips: list[np.ndarray]
    answer: str


def text_fault(example: Example) -> str | None:
    """What makes the text or prompt of a row one that no processor takes, None if nothing does: half a character, audio in the text."""
    for name, text in (("text", example.text), ("prompt", example.prompt)):
        if text is not None and (fault := lone_surrogate(text)):
            return f"{name} holds {fault}"
    if example.text is not None and AUDIO_TOKEN in example.text:
        return f"text holds {AUDIO_TOKEN}, which stands for audio in prompts: {example.text!r}"
    return None


def chat(prompt: str, clips: int = 1) -> list[dict[str, str]]:
    """One user turn with a placeholder for each of ``clips``: where the prompt has its placeholder, else before it.

    ValueError for a prompt with several placeholders and another number of clips.
    """
    places = prompt.count(AUDIO_TOKEN)
    if places == 0:
        prompt = AUDIO_TOKEN * clips + prompt
    elif places == 1:
        prompt = prompt.replace(AUDIO_TOKEN, AUDIO_TOKEN * clips)
    elif places != clips:
        raise ValueError(f"prompt has {places} {AUDIO_TOKEN} placeholders for {clips} clips: {prompt!r}")
    return [{"role": "user", "content": prompt}]
