"""What a corpus is: examples, the rows that could not become one, and the limit past which those stop a run."""

from __future__ import annotations

import codecs
import errno
import json
import logging
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from .audio import AudioError, AudioSource, duration_of, name_of

logger = logging.getLogger(__name__)

# How many bad rows a message lists before it only counts.
LISTED = 5
# How many characters of a path that is too long for the system a message shows.
SHOWN = 200


@dataclass(frozen=True)
class Example:
    """One row of a corpus.

    ``audio`` is a path, an encoded file's bytes, or a pair (samples, sampling rate); ``text`` the transcript or answer to learn, None where
    there is none; ``prompt`` what the user turn says (None: the run's own). ``offset`` and ``duration`` in seconds pick a section of the
    file; ``duration`` None is up to its end. ``answers`` are all the answers that count as right; ``extra`` is whatever else the row holds
    (speaker, language, ...). ``where`` names the row in messages.
    """

    audio: AudioSource
    text: str | None = None
    prompt: str | None = None
    id: str = ""
    offset: float = 0.0
    duration: float | None = None
    answers: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def name(self) -> str:
        """How messages call the row: where it stands, else its id, else its audio."""
        return self.where or self.id or name_of(self.audio)


@dataclass(frozen=True)
class Problem:
    """A row that is not what it should be: ``where`` names it, ``reason`` says what was found."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class TooManyBadRows(RuntimeError):
    """More rows than the limit allows could not be used. Its message lists the first few."""


class Corpus(Sequence[Example]):
    """A sequence of examples with a name and the rows that are not among them.

    ``rows`` may be any sequence: a list, or one that builds each example when asked. ``problems`` are the rows left out, each with its
    reason, so that ``len(corpus) + len(corpus.problems)`` is what the source holds.
    """

    def __init__(self, rows: Sequence[Example], problems: Iterable[Problem] = (), name: str = "") -> None:
        self._rows = rows
        self.problems: list[Problem] = list(problems)
        self.name = name
        self._durations: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Corpus: ...

    def __getitem__(self, index: int | slice) -> Example | Corpus:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        return self._rows[index]

    def __repr__(self) -> str:
        return f"Corpus({self.name or 'unnamed'}: {len(self)} rows, {len(self.problems)} bad)"

    def select(self, indices: Sequence[int], problems: Iterable[Problem] = ()) -> Corpus:
        """The rows at ``indices``, in that order; its problems are this corpus's and ``problems``."""
        chosen = Corpus(Picked(self._rows, indices), [*self.problems, *problems], self.name)
        if self._durations is not None:
            chosen._durations = self._durations[np.asarray(indices, dtype=np.int64)]
        return chosen

    def for_training(self, max_seconds: float | None = None) -> Corpus:
        """The rows that can be learnt from: those with a text. The others, and any longer than ``max_seconds``, become problems."""
        return self._keep(lambda row: bool(row.text and row.text.strip()), "no text to learn", max_seconds)

    def for_scoring(self) -> Corpus:
        """The rows that can be scored: those with a text or answers, an empty text included. The others become problems."""
        return self._keep(lambda row: row.text is not None or bool(row.answers), "no text or answers to score against", None)

    def _keep(self, usable: Callable[[Example], bool], reason: str, max_seconds: float | None) -> Corpus:
        kept, problems = [], []
        seconds = self.durations() if max_seconds is not None else None
        for index, row in enumerate(self._rows):
            if not usable(row):
                problems.append(Problem(row.name, reason))
            elif seconds is not None and max_seconds is not None and seconds[index] > max_seconds:
                problems.append(Problem(row.name, f"{seconds[index]:.1f} s, and max_seconds is {max_seconds:g}"))
            else:
                kept.append(index)
        return self.select(kept, problems)

    def durations(self) -> np.ndarray:
        """(rows,) float64, seconds: as declared, else from the file's header; NaN where that cannot be read. Computed once."""
        if self._durations is None:
            self._durations = np.array([_seconds(row) for row in self._rows], dtype=np.float64)
        return self._durations

    def check_limit(self, max_bad_rows: int) -> None:
        """TooManyBadRows, naming the first few, if more than ``max_bad_rows`` rows were left out."""
        if len(self.problems) > max_bad_rows:
            raise TooManyBadRows(describe_problems(self.problems, max_bad_rows, self.name))


class Picked(Sequence[Example]):
    """Some rows of a sequence, without copying them."""

    def __init__(self, rows: Sequence[Example], indices: Sequence[int]) -> None:
        self._rows = rows
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[self._indices[index]]


class Joined(Sequence[Example]):
    """Several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> Any:
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - (int(self._ends[part - 1]) if part else 0)]


class WithPrompt(Sequence[Example]):
    """The same rows, with ``prompt`` where they have none of their own."""

    def __init__(self, rows: Sequence[Example], prompt: str) -> None:
        self._rows = rows
        self._prompt = prompt

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        row = self._rows[index]
        return row if row.prompt is not None else replace(row, prompt=self._prompt)


class BadRowLog:
    """The rows met while running that could not be used, shared by every process that writes to the same file.

    One JSON object a line (``where``, ``reason``, ``severity``: "error" or "warning"), each appended in one write, so DataLoader workers
    and ranks need no lock. A row is counted once however often it is met. ``path`` None takes a temporary file. Errors past ``limit``
    raise `TooManyBadRows`; warnings (silent, clipped) never do. Where the file cannot be written (a full disk) the rows are kept in memory,
    each process its own, and a warning says so once.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, limit: int = 100) -> None:
        if limit < 0:
            raise ValueError(f"limit must be 0 or more bad rows, got {limit}")
        self.limit = limit
        if path is None:
            handle, path = tempfile.mkstemp(prefix="steermoe-bad-rows-", suffix=".jsonl")
            os.close(handle)
            weakref.finalize(self, _remove_in, os.getpid(), path)
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._seen: set[tuple[str, Problem]] = set()
        self._unwritten: list[tuple[str, Problem]] = []

    def error(self, where: str, reason: str) -> None:
        """Record a row that is lost. TooManyBadRows if that makes more than ``limit``."""
        if self._append(where, reason, "error"):
            errors = self.errors
            if len(errors) > self.limit:
                raise TooManyBadRows(describe_problems(errors, self.limit))

    def warn(self, where: str, reason: str) -> None:
        """Record a row that is used and looks wrong."""
        self._append(where, reason, "warning")

    @property
    def errors(self) -> list[Problem]:
        return self._read("error")

    @property
    def warnings(self) -> list[Problem]:
        return self._read("warning")

    def _append(self, where: str, reason: str, severity: str) -> bool:
        """Whether this process had not seen it. Other processes' lines are told apart when the file is read."""
        key = (severity, Problem(where, reason))
        if key in self._seen:
            return False
        self._seen.add(key)
        line = json.dumps({"where": where, "reason": reason, "severity": severity}, ensure_ascii=False) + "\n"
        # A lone surrogate in a name is written as JSON escapes it.
        content = line.encode("utf-8", errors="backslashreplace")
        try:
            with open(self.path, "ab+", buffering=0) as file:
                # What a process was stopped in the middle of stays a line of its own, which is passed over.
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    content = b"\n" + content
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._unwritten:
                logger.warning("%s cannot be written (%s): bad rows are counted, and no longer recorded there", self.path, error.strerror)
            self._unwritten.append(key)
        return True

    def _read(self, severity: str) -> list[Problem]:
        found: dict[Problem, None] = {}
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError:  # not there yet, or not to be had: what could not be written is in memory
            lines = []
        for line in lines:
            try:
                entry = json.loads(line)
                if entry["severity"] == severity:
                    found[Problem(entry["where"], entry["reason"])] = None
            except (ValueError, KeyError, TypeError):
                # Blank, or cut off when its process was stopped: the row is recorded again when it is met again.
                continue
        found |= {problem: None for kind, problem in self._unwritten if kind == severity}
        return list(found)


def describe_problems(problems: Sequence[Problem], limit: int, name: str = "") -> str:
    """One message for more bad rows than the ``limit`` allows: how many, and the first few of them, a line each."""
    listed = "".join(f"\n  {problem}" for problem in problems[:LISTED])
    more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    of = f" in {name}" if name else ""
    return f"{len(problems)} bad rows{of}, and max_bad_rows allows {limit}: mend or remove them, or allow more{listed}{more}"


def numbered_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file that are not blank, without a byte order mark and the whitespace at their ends, numbered from 1.

    As bytes, for `decoded`: one line that is not UTF-8 must not stop the others.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line := (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rstrip():
                yield number, line


def decoded(line: bytes) -> str:
    """A line of a transcript or manifest. ValueError, naming the first bad byte, if it is not UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1})") from error


def is_file(path: Path) -> bool:
    """Whether a row's file is there. ValueError, with the system's reason, where that cannot be told: one row must not stop the others."""
    try:
        return path.is_file()
    except OSError as error:
        shown = str(path) if len(str(path)) <= SHOWN else f"{str(path)[:SHOWN]}..."
        raise ValueError(f"{shown} cannot be looked at ({error.strerror})") from error


def lone_surrogate(text: str) -> str | None:
    """What is said of a text with half of a character in it, as JSON can have and no tokenizer or file takes; None of any other."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"a lone surrogate ({text[error.start]!r} at character {error.start + 1}): half of a character"
    return None


def _remove_in(process: int, path: str) -> None:
    """Remove a temporary file, in the process that made it: a forked worker that drops its copy of the log must not."""
    if os.getpid() == process:
        Path(path).unlink(missing_ok=True)


def _seconds(row: Example) -> float:
    if row.duration is not None:
        return row.duration
    try:
        return max(duration_of(row.audio) - row.offset, 0.0)
    except AudioError:
        return math.nan
