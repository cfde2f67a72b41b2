"""Texts from audio: requests in any order are batched by length, decoded in workers, and answered by the model."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .data.audio import AudioSource, Loudness, name_of, read_audio
from .data.bucketing import batches_by_length
from .data.collator import chat
from .data.corpus import BadRowLog

# Whisper's own limit on the text of 30 s; a model that never ends its turn stops here.
MAX_NEW_TOKENS = 448


@dataclass(frozen=True)
class Request:
    """One prompt about one or more sections of a recording, (begin, end) in seconds, each a clip of the prompt.

    ``key`` is the caller's, to know the answer by; ``where`` names the recording in messages. ``skip_silence``: a request of nothing but
    silence is answered by an empty text, as a language model given silence makes something up. ``max_new_tokens`` stands
    for that of `respond`'s ``generation``, if not None.
    """

    key: Any
    audio: AudioSource
    sections: tuple[tuple[float, float], ...]
    prompt: str
    where: str = ""
    skip_silence: bool = False
    max_new_tokens: int | None = None

    @property
    def seconds(self) -> float:
        return sum(end - begin for begin, end in self.sections)


@dataclass(frozen=True)
class Response:
    """The text a request got. Its decoded audio had ``loudness`` and ``audio_seconds``; ``seconds`` is its share of its batch's time.

    ``cut_off``: the model had not ended its turn when it had made as many tokens as it may.
    """

    request: Request
    text: str
    loudness: Loudness
    audio_seconds: float
    seconds: float
    cut_off: bool = False


@dataclass(frozen=True)
class _Prepared:
    """A batch of ``size`` requests: those to answer and those of silence, each with its loudness and seconds, and the processor's batch.

    ``max_new_tokens`` is what the requests have, all of them.
    """

    size: int
    max_new_tokens: int | None
    answerable: list[tuple[Request, Loudness, float]]
    silent: list[tuple[Request, Loudness, float]]
    inputs: Any


def respond(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    bad_rows: BadRowLog | None = None,
    progress: str | None = None,
    **generation: Any,
) -> Iterator[Response]:
    """The responses, longest requests first, as they come.

    ``generation`` goes to ``model.generate``; greedy with at most `MAX_NEW_TOKENS` unless it, or a ``generation_config`` among it, says
    otherwise. Audio that cannot be decoded (AudioError) and a prompt that does not fit (ValueError, as `chat` and the processor) raise, or
    with ``bad_rows`` are recorded and get no response.
    ``num_workers`` processes decode ahead. ``progress`` is the text beside a progress bar on the error stream, None for no bar. ValueError
    for a ``batch_size`` below 1, and as `answer_limit`'s.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    sampled = _setting("do_sample", generation)
    generation |= {"max_new_tokens": answer_limit(generation), "do_sample": False if sampled is None else sampled}
    loader = torch.utils.data.DataLoader(
        _Indexed(requests),
        batch_sampler=_batches(requests, batch_size),
        collate_fn=_Preparation(processor, bad_rows),
        num_workers=num_workers,
    )
    training = model.training
    model.eval()
    try:
        with _bar(progress) as bar:
            task = bar.add_task(progress or "", total=len(requests))
            begun = time.perf_counter()
            for batch in loader:
                limit = {} if batch.max_new_tokens is None else {"max_new_tokens": batch.max_new_tokens}
                texts = _generate(model, processor, batch.inputs, generation | limit) if batch.answerable else []
                share = (time.perf_counter() - begun) / batch.size
                texts += [("", False)] * len(batch.silent)
                for prepared, (text, cut_off) in zip([*batch.answerable, *batch.silent], texts, strict=True):
                    request, loudness, audio_seconds = prepared
                    yield Response(request, text, loudness, audio_seconds, share, cut_off)
                bar.advance(task, batch.size)
                # Again, so that what the caller does with a response is not counted.
                begun = time.perf_counter()
    finally:
        model.train(training)


def answer_limit(generation: Mapping[str, Any]) -> int:
    """New tokens that an answer by these options of ``model.generate`` may have: ``max_new_tokens``, `MAX_NEW_TOKENS` by default.

    ValueError for one below 1, for ``max_length`` in its place, and for options by which there is more than a text a request.
    """
    limit = _setting("max_new_tokens", generation)
    if limit is None and (length := _setting("max_length", generation)) is not None:
        raise ValueError(f"max_length counts the prompt and its audio, got {length}: give max_new_tokens, which counts the answer alone")
    if limit is None:
        limit = MAX_NEW_TOKENS
    if isinstance(limit, bool) or not hasattr(limit, "__index__") or operator.index(limit) < 1:
        raise ValueError(f"max_new_tokens must be a whole number of at least 1, got {limit!r}")
    if (texts := _setting("num_return_sequences", generation)) not in (None, 1):
        raise ValueError(f"num_return_sequences must be 1, as one text a clip is returned, got {texts}")
    if _setting("return_dict_in_generate", generation):
        raise ValueError("return_dict_in_generate must be false, as one text a clip is returned")
    return operator.index(limit)


def _setting(name: str, generation: Mapping[str, Any], model: Any = None) -> Any:
    """What ``generation`` says, itself or in its generation_config, else the model's generation config; None where nothing does."""
    configs = (generation.get("generation_config"), getattr(model, "generation_config", None))
    said = (generation.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in said if value is not None), None)


def _batches(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Indices, the longest requests first; those of a batch have the same limit, as it is generated with one."""
    by_limit: dict[int | None, list[int]] = {}
    for index, request in enumerate(requests):
        by_limit.setdefault(request.max_new_tokens, []).append(index)
    batches = [
        [indices[at] for at in batch]
        for indices in by_limit.values()
        for batch in batches_by_length([requests[index].seconds for index in indices], batch_size)
    ]
    return sorted(batches, key=lambda batch: -requests[batch[0]].seconds)


class _Indexed(torch.utils.data.Dataset[Request]):
    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests

    def __len__(self) -> int:
        return len(self._requests)

    def __getitem__(self, index: int) -> Request:
        return self._requests[index]


class _Decoded(NamedTuple):
    """A request with its audio."""

    request: Request
    loudness: Loudness
    seconds: float
    messages: list[dict[str, str]]
    clips: list[np.ndarray]

    @property
    def measured(self) -> tuple[Request, Loudness, float]:
        return self.request, self.loudness, self.seconds


class _Preparation:
    """Decodes a batch of requests and gives it to the processor."""

    def __init__(self, processor: Any, bad_rows: BadRowLog | None) -> None:
        self._processor = processor
        self._bad_rows = bad_rows

    def __call__(self, requests: Sequence[Request]) -> _Prepared:
        decoded = [row for request in requests if (row := self._decoded(request)) is not None]
        silent = [row for row in decoded if row.request.skip_silence and row.loudness.silent]
        answerable = [row for row in decoded if not (row.request.skip_silence and row.loudness.silent)]
        inputs = None
        if answerable:
            try:
                inputs = self._processed(answerable)
            except ValueError:
                # Which request it was shows when each is taken by itself: a prompt past the language model's context, for instance.
                answerable = [row for row in answerable if self._accepted(row)]
                inputs = self._processed(answerable) if answerable else None
        return _Prepared(
            len(requests), requests[0].max_new_tokens, [row.measured for row in answerable], [row.measured for row in silent], inputs
        )

    def _decoded(self, request: Request) -> _Decoded | None:
        """What the processor gets of a request; None, and a line in the log, if it cannot be used."""
        try:
            messages = chat(request.prompt, len(request.sections))
            clips = [read_audio(request.audio, self._processor.sampling_rate, begin, end - begin) for begin, end in request.sections]
        except ValueError as error:
            if self._bad_rows is None:
                raise
            self._bad_rows.error(request.where, str(error))
            return None
        loudness = Loudness.joined(clip.loudness for clip in clips)
        if self._bad_rows is not None:
            for warning in loudness.warnings:
                self._bad_rows.warn(request.where, warning)
        return _Decoded(request, loudness, sum(clip.seconds for clip in clips), messages, [clip.samples for clip in clips])

    def _processed(self, rows: Sequence[_Decoded]) -> Any:
        return self._processor(messages=[row.messages for row in rows], audio=[clip for row in rows for clip in row.clips])

    def _accepted(self, row: _Decoded) -> bool:
        """Whether the processor takes the request; a line in the log if it does not, and without one a ValueError that names it."""
        try:
            self._processed([row])
        except ValueError as error:
            if self._bad_rows is None:
                raise ValueError(f"{row.request.where or name_of(row.request.audio)}: {error}") from error
            self._bad_rows.error(row.request.where, str(error))
            return False
        return True


@torch.inference_mode()
def _generate(model: Any, processor: Any, inputs: Any, generation: dict[str, Any]) -> list[tuple[str, bool]]:
    """A text a row, and whether it is cut off."""
    tokens = model.generate(**inputs.to(model.device), **generation)
    texts = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return list(zip(texts, _cut_off(model, tokens, generation), strict=True))


def _cut_off(model: Any, tokens: torch.Tensor, generation: dict[str, Any]) -> list[bool]:
    """Of each row, whether it has all the tokens it may have and the last of them ends nothing; False where no token ends a turn."""
    limit, ends = generation["max_new_tokens"], _setting("eos_token_id", generation, model)
    if ends is None or tokens.shape[1] < limit:
        return [False] * len(tokens)
    # A row that has ended before is filled up with the pad token, or with the first that ends a turn.
    last = {*ends} if isinstance(ends, list | tuple) else {int(ends)}
    last.add(_setting("pad_token_id", generation, model))
    return [token not in last for token in tokens[:, -1].tolist()]


def _bar(progress: str | None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=progress is None)
