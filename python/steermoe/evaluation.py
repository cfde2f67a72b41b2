"""How well a model hears and answers: the whole corpus, every hypothesis kept, errors counted and named."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .capacity import Capacity, capacity
from .data.audio import name_of, split_at_quiet
from .data.collator import TRANSCRIPTION_PROMPT
from .data.corpus import BadRowLog, Corpus, Problem
from .error_rates import ErrorRate, WordErrors, bootstrap, normalizer, word_errors
from .generation import Request, Response, answer_limit, respond
from .transcription import join_texts

__all__ = ["ErrorRate", "Evaluation", "ExactMatch", "Hypothesis", "WordErrors", "evaluate", "exact_match", "word_errors"]

TASKS = ("transcription", "question")


@dataclass(frozen=True)
class Hypothesis:
    """One row's outcome. ``answers`` is empty but for questions; ``duration`` of the audio and ``seconds`` of processing, in seconds.

    ``place`` is the row's among those of the corpus that can be scored.
    """

    id: str
    audio: str
    reference: str
    hypothesis: str
    answers: tuple[str, ...]
    duration: float
    seconds: float
    extra: dict[str, Any] = field(default_factory=dict)
    place: int = 0


@dataclass(frozen=True)
class ExactMatch:
    """Answers that are, normalised, one of the right ones. ``interval`` is the percentile bootstrap's over questions, 95%."""

    correct: np.ndarray
    interval: tuple[float, float]

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    def to_dict(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "correct": int(self.correct.sum()),
            "questions": len(self.correct),
        }


@dataclass(frozen=True)
class Evaluation:
    """The outcome of `evaluate`. ``rows`` is what the corpus holds: the ``hypotheses``, in its order, and the ``problems``.

    ``errors`` is set for transcription and ``match`` for questions. ``audio_seconds`` over ``seconds``: what was heard, and the time from
    reading it to the text. ``warnings`` are scored rows that look wrong: silent, clipped.
    """

    name: str
    task: str
    rows: int
    hypotheses: list[Hypothesis]
    problems: list[Problem]
    warnings: list[Problem]
    errors: WordErrors | None
    match: ExactMatch | None
    audio_seconds: float
    seconds: float

    @property
    def real_time_factor(self) -> float:
        """Processing time over audio time: below 1 is faster than speech."""
        return self.seconds / self.audio_seconds

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain JSON types; the hypotheses are in the JSONL."""
        return {
            "name": self.name,
            "task": self.task,
            "rows": self.rows,
            "scored": len(self.hypotheses),
            "errors": self.errors.to_dict() if self.errors else None,
            "match": self.match.to_dict() if self.match else None,
            "audio_seconds": self.audio_seconds,
            "seconds": self.seconds,
            "real_time_factor": self.real_time_factor,
            "problems": [{"where": problem.where, "reason": problem.reason} for problem in self.problems],
            "warnings": [{"where": problem.where, "reason": problem.reason} for problem in self.warnings],
        }

    def write_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Every row of the corpus, hypotheses in order and then the rows that could not be scored; the file appears whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(target)
        try:
            # What is no Unicode, a lone surrogate of a manifest, is written as the escape that JSON has for it.
            with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
                for index, row in enumerate(self.hypotheses):
                    file.write(json.dumps(self._line(index, row), ensure_ascii=False, default=str) + "\n")
                for problem in self.problems:
                    file.write(json.dumps({"id": problem.where, "problem": problem.reason}, ensure_ascii=False) + "\n")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def _line(self, index: int, row: Hypothesis) -> dict[str, Any]:
        line: dict[str, Any] = {"id": row.id, "audio": row.audio, "reference": row.reference, "hypothesis": row.hypothesis}
        if self.errors is not None:
            line["errors"] = self.errors.primary.utterance(index)
        if self.match is not None:
            line |= {"answers": list(row.answers), "correct": bool(self.match.correct[index])}
        return line | {"duration": row.duration, "seconds": row.seconds} | ({"extra": row.extra} if row.extra else {})

    def __rich__(self) -> RenderableType:
        summary = Table(title=Text(self.name), title_justify="left", show_header=False)
        summary.add_row("rows scored", f"{len(self.hypotheses)} of {self.rows}")
        if self.errors is not None:
            summary.add_row("language", self.errors.language)
        summary.add_row("audio", f"{self.audio_seconds / 3600:.2f} h")
        summary.add_row("real-time factor", f"{self.real_time_factor:.4f}")
        if self.match is not None:
            low, high = self.match.interval
            summary.add_row("exact match", f"{self.match.accuracy:.2%} ({low:.2%} to {high:.2%})")
        parts: list[RenderableType] = [summary]
        if self.errors is not None:
            rates = Table("", "rate", "95% interval", "reference", "hits", "substitutions", "deletions", "insertions", title_justify="left")
            for name in ("wer", "cer", "raw_wer", "raw_cer"):
                rate: ErrorRate = getattr(self.errors, name)
                numbers = (rate.reference_length, rate.hits, rate.substitutions, rate.deletions, rate.insertions)
                low, high = rate.interval
                title = name.replace("raw_", "raw ").replace("wer", "WER").replace("cer", "CER")
                rates.add_row(title, f"{rate.rate:.2%}", f"{low:.2%} to {high:.2%}", *map(str, numbers))
            parts.append(rates)
        for title, problems in (("not scored", self.problems), ("looks wrong", self.warnings)):
            if problems:
                table = Table("row", title, title=f"{title} ({len(problems)})", title_justify="left")
                for problem in problems[:10]:
                    table.add_row(Text(problem.where, overflow="fold"), Text(problem.reason, overflow="fold"))
                if len(problems) > 10:
                    table.add_row("...", f"and {len(problems) - 10} more")
                parts.append(table)
        return Group(*parts)


def evaluate(
    model: Any,
    processor: Any,
    corpus: Corpus,
    *,
    task: str | None = None,
    prompt: str | None = None,
    language: str = "en",
    normalization: str | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    output: str | os.PathLike[str] | None = None,
    max_bad_rows: int = 100,
    seed: int = 0,
    progress: bool = False,
    **generation: Any,
) -> Evaluation:
    """Score every row of ``corpus``: word and character error rates for transcription, exact match for questions.

    ``task`` "transcription" or "question"; None is "question" where any row has answers. ``prompt`` is for rows without their own.
    ``language`` and ``normalization`` are `word_errors`'s. Batches hold clips of similar length; results are in the corpus's order. Longer
    clips than encoder and language model take (`longest_piece`) are split at quiet places and their texts joined; a question gets all
    pieces of what the encoder takes in one prompt, and is not scored where those are more than the language model takes. What that is, and
    how long its answer may be, is as in `ask`.
    ``output`` is a JSONL of every row: id, audio, reference, hypothesis, errors, seconds. ``seed`` is the bootstrap's; ``generation`` goes
    to ``model.generate``.

    Rows without a text or with unusable audio are not scored but named in ``problems`` and in the JSONL; more than ``max_bad_rows`` raise
    TooManyBadRows. ValueError for an unknown task or language, for ``generation`` as `generation.answer_limit`'s, and where no row can be
    scored; OSError, before anything is generated, for an ``output`` that cannot be written. Where writing fails in the end, the OSError has
    the result as its attribute ``evaluation``.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)} or None, got {task!r}")
    # What scoring needs is asked for now: after hours of generation is late to learn that it is not installed.
    word_errors([""], [""], language, normalization=normalization)
    answer_limit(generation)
    if output is not None:
        check_output(output)
    rows = corpus.for_scoring()
    rows.check_limit(max_bad_rows)
    if not len(rows):
        raise ValueError(f"{corpus.name or 'the corpus'} has no row to score: {'; '.join(map(str, rows.problems[:3]))}")
    if task is None:
        task = "question" if any(row.answers for row in rows) else "transcription"
    prompt = TRANSCRIPTION_PROMPT if prompt is None else prompt
    log = BadRowLog(limit=max_bad_rows - len(rows.problems))
    begun = time.perf_counter()
    requests, generation = _requests(rows, lambda text: capacity(model, processor, text), prompt, task, log, generation)
    seconds = time.perf_counter() - begun
    responses: dict[tuple[int, int], Response] = {}
    shown = f"evaluating {rows.name}" if progress else None
    for response in respond(
        model, processor, requests, batch_size=batch_size, num_workers=num_workers, bad_rows=log, progress=shown, **generation
    ):
        responses[response.request.key] = response
        seconds += response.seconds
    hypotheses = _hypotheses(rows, requests, responses)
    if not hypotheses:
        raise ValueError(f"no row of {rows.name} could be scored: {'; '.join(map(str, log.errors[:3]))}")
    evaluation = Evaluation(
        name=corpus.name,
        task=task,
        rows=len(corpus) + len(corpus.problems),
        hypotheses=hypotheses,
        problems=[*rows.problems, *log.errors],
        warnings=log.warnings,
        errors=_errors(hypotheses, language, normalization, seed) if task == "transcription" else None,
        match=_match(hypotheses, language, normalization, seed) if task == "question" else None,
        audio_seconds=sum(row.duration for row in hypotheses),
        seconds=seconds,
    )
    if output is not None:
        try:
            evaluation.write_jsonl(output)
        except OSError as error:
            error.evaluation = evaluation  # type: ignore[attr-defined] # what took hours is not lost with a full disk
            raise
    return evaluation


def check_output(path: str | os.PathLike[str]) -> None:
    """Try to write where `Evaluation.write_jsonl` will: ValueError for a folder, OSError for a place that takes no file."""
    target = Path(path)
    if target.is_dir():
        raise ValueError(f"output must be a file, and {target} is a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    partial.touch()
    partial.unlink()


def exact_match(
    hypotheses: Sequence[str],
    answers: Sequence[Sequence[str]],
    language: str = "en",
    *,
    normalization: str | None = None,
    seed: int = 0,
) -> ExactMatch:
    """Whether each hypothesis is, normalised, one of its row's ``answers``: equal as a whole, never a part of it.

    Normalised as in `word_errors`. ValueError for lists of different or no length.
    """
    if len(hypotheses) != len(answers) or not len(answers):
        raise ValueError(f"hypotheses and answers must be as many, and at least one, got {len(hypotheses)} and {len(answers)}")
    clean = normalizer(language, normalization)

    def key(text: str) -> str:
        # Where normalising leaves nothing ("?", "um"), the text itself is compared.
        return clean(text) or text.strip().casefold()

    correct = np.array([key(text) in {key(answer) for answer in right} for text, right in zip(hypotheses, answers, strict=True)])
    return ExactMatch(correct, bootstrap(correct.astype(np.int64), np.ones(len(correct), dtype=np.int64), seed))


def _partial(target: Path) -> Path:
    """Where ``target`` is written until it is whole."""
    return target.with_name(target.name + ".partial")


def _requests(
    rows: Corpus, capacity_of: Callable[[str], Capacity], prompt: str, task: str, log: BadRowLog, generation: dict[str, Any]
) -> tuple[list[Request], dict[str, Any]]:
    """One request a row, or one a piece of a long row that is transcribed, ``key`` being (row, piece); and the options that all fit.

    Questions have limits on their answers of their own, as `ask` would set them.
    """
    requests = []
    known = rows.durations()
    fitting = generation
    capacity_of = cache(capacity_of)
    for index, row in enumerate(rows):
        asked = row.prompt or prompt
        try:
            room = capacity_of(asked)
            longest = room.clip_seconds if task == "question" else room.longest_clip(room.answer(generation))
            # A clip that fits needs no look into its file before its batch's turn. One of 0 s begins past the file's end, and is named.
            fits = 0 < known[index] <= longest
            sections = (
                [(row.offset, row.offset + float(known[index]))] if fits else split_at_quiet(row.audio, longest, row.offset, row.duration)
            )
        except ValueError as error:
            log.error(row.name, str(error))
            continue
        if task == "question":
            most = room.question_seconds(generation)
            if (seconds := sum(end - begin for begin, end in sections)) > most:
                log.error(row.name, f"{seconds:.1f} s of audio, and the language model takes {most:.1f} s with this question")
                continue
            # Its own limit: what one recording leaves for an answer is no measure of the others.
            limit = room.within(generation, sections).get("max_new_tokens")
            requests.append(Request((index, 0), row.audio, tuple(sections), asked, row.name, max_new_tokens=limit))
        else:
            requests += [
                Request((index, piece), row.audio, (section,), asked, row.name, skip_silence=True) for piece, section in enumerate(sections)
            ]
            fitting = room.within(fitting, [max(sections, key=lambda section: section[1] - section[0])])
    return requests, fitting


def _hypotheses(rows: Corpus, requests: Sequence[Request], responses: dict[tuple[int, int], Response]) -> list[Hypothesis]:
    """One a row of which every piece has a response, in the corpus's order."""
    pieces: dict[int, list[Request]] = {}
    for request in requests:
        pieces.setdefault(request.key[0], []).append(request)
    hypotheses = []
    for index, asked in pieces.items():
        if not all(request.key in responses for request in asked):
            continue
        row = rows[index]
        answered = [responses[request.key] for request in asked]
        hypotheses.append(
            Hypothesis(
                id=row.id,
                audio=name_of(row.audio),
                reference=row.text if row.text is not None else row.answers[0],
                hypothesis=join_texts([response.text for response in answered]),
                answers=row.answers,
                duration=sum(response.audio_seconds for response in answered),
                seconds=sum(response.seconds for response in answered),
                extra=dict(row.extra),
                place=index,
            )
        )
    return hypotheses


def _errors(hypotheses: Sequence[Hypothesis], language: str, normalization: str | None, seed: int) -> WordErrors:
    references = [row.reference for row in hypotheses]
    return word_errors(references, [row.hypothesis for row in hypotheses], language, normalization=normalization, seed=seed)


def _match(hypotheses: Sequence[Hypothesis], language: str, normalization: str | None, seed: int) -> ExactMatch:
    answers = [row.answers or (row.reference,) for row in hypotheses]
    return exact_match([row.hypothesis for row in hypotheses], answers, language, normalization=normalization, seed=seed)
