"""How much audio and answer one prompt holds: the encoder takes so many seconds, and the language model so many tokens in all."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .config import AUDIO_TOKEN
from .generation import answer_limit

__all__ = ["Capacity", "capacity"]

# Tokens that are kept for the answer to a question, however much audio it is about.
LEAST_ANSWER = 32


@dataclass(frozen=True)
class Capacity:
    """Of a prompt: ``clip_seconds`` is the encoder's longest clip, ``tokens`` what the language model takes besides the prompt's text.

    ``tokens`` is None where no limit is known; ``tokens_of`` counts the tokens that a clip of so many seconds comes to.
    """

    clip_seconds: float
    tokens: int | None = None
    tokens_of: Callable[[float], int] = lambda seconds: 0

    def answer(self, generation: dict[str, Any]) -> int:
        """Tokens to keep for an answer by these options of ``model.generate``; at most half of all, so that there is room for audio.

        ValueError as `answer_limit`'s.
        """
        asked = answer_limit(generation)
        return asked if self.tokens is None else min(asked, self.tokens // 2)

    def longest_clip(self, answer: int) -> float:
        """Seconds of the longest clip that leaves room for ``answer`` tokens."""
        return min(self.clip_seconds, self.seconds(answer))

    def seconds(self, answer: int) -> float:
        """Seconds of audio, in as many clips as it takes, that leave room for ``answer`` tokens; inf where no limit is known."""
        if self.tokens is None:
            return math.inf
        room = self.tokens - answer
        clips = room // self.tokens_of(self.clip_seconds)
        rest = room - clips * self.tokens_of(self.clip_seconds)
        milliseconds = range(1, int(1000 * self.clip_seconds) + 1)
        return clips * self.clip_seconds + bisect.bisect_right(milliseconds, rest, key=lambda at: self.tokens_of(at / 1000)) / 1000

    def question_seconds(self, generation: dict[str, Any]) -> float:
        """Seconds of audio that a question can be about, an answer by these options being short if need be."""
        return self.seconds(min(LEAST_ANSWER, self.answer(generation)))

    def within(self, generation: dict[str, Any], sections: Sequence[tuple[float, float]]) -> dict[str, Any]:
        """The options with ``max_new_tokens`` cut to what a prompt with these clips leaves."""
        if self.tokens is None:
            return generation
        left = self.tokens - sum(self.tokens_of(end - begin) for begin, end in sections)
        return generation | {"max_new_tokens": max(1, min(answer_limit(generation), left))}


def capacity(model: Any, processor: Any, prompt: str) -> Capacity:
    """What fits a prompt of this text. ValueError for one that leaves no room for a second of audio."""
    language_model = getattr(model, "language_model", None)
    if language_model is None:  # nothing is known of its limits
        return Capacity(processor.max_seconds)
    limit = _limit(language_model, processor)
    if limit is None:
        return Capacity(processor.max_seconds)
    text = prompt.replace(AUDIO_TOKEN, "")
    taken = processor(messages=[[{"role": "user", "content": text}]])["input_ids"].shape[1]
    found = Capacity(processor.max_seconds, limit - taken, processor.audio_tokens)
    if found.longest_clip(found.answer({})) < min(1.0, found.clip_seconds):
        raise ValueError(f"the prompt has {taken} tokens, and the language model takes {limit}: too few are left for audio and an answer")
    return found


def _limit(language_model: Any, processor: Any) -> int | None:
    """The tokens that the language model takes in all: its positions, or fewer if its tokenizer says so."""
    positions = getattr(language_model.config.get_text_config(), "max_position_embeddings", None)
    known = [count for count in (positions, processor.tokenizer.model_max_length) if count is not None and 0 < count < 10**9]
    return min(known) if known else None
