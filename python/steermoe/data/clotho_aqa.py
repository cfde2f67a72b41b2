"""Clotho-AQA: a CSV of questions about sounds, each answered by three annotators, and a folder of audio files."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from .corpus import Corpus, Example, Problem, decoded, is_file

PRIORITY = 10
LOOKED_FOR = "a .csv with columns file_name, QuestionText and answer, or a folder with clotho_aqa_SPLIT.csv"

_FILE = ("file_name", "filename", "audio_filepath", "file")
_QUESTION = ("questiontext", "question")
# Where the published archive is unpacked to, by those who follow its names.
_AUDIO_FOLDERS = ("audio_files", "audio", ".")


def takes(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob("clotho_aqa_*.csv"))
    return path.suffix.lower() == ".csv" and _columns(_header(path)) is not None


def read(path: str | os.PathLike[str], *, split: str | None = None, audio_dir: str | None = None) -> Corpus:
    """One row a question: ``answers`` are the annotators', in order, ``text`` the one most of them gave, the first of equals.

    The published CSV has a line an annotator; those with one file and question are grouped, also where a line has several answer columns.
    ``split`` picks clotho_aqa_SPLIT.csv of a folder. Audio is looked for in ``audio_dir``, else in audio_files, audio and beside the CSV.
    Questions without an answer or whose audio is missing, and lines that are not UTF-8 or not CSV, are problems. ValueError for a table
    without the columns.
    """
    table = _table(Path(path), split)
    header = _header(table)
    columns = _columns(header)
    if columns is None:
        raise ValueError(f"{table} needs columns file_name, QuestionText and answer, got {_printable(header) or 'none'}")
    file_column, question_column, answer_columns = columns
    folders = [Path(audio_dir)] if audio_dir is not None else [table.parent / name for name in _AUDIO_FOLDERS]
    groups: dict[tuple[str, str], tuple[int, list[str]]] = {}
    problems: list[Problem] = []
    with _opened(table) as file:
        lines = csv.DictReader(file)
        while True:
            try:
                line = next(lines)
                _check_utf8(line, [file_column, question_column, *answer_columns])
            except StopIteration:
                break
            except (csv.Error, ValueError) as error:
                reason = f"not CSV ({error})" if isinstance(error, csv.Error) else str(error)
                problems.append(Problem(f"{table}:{lines.reader.line_num}", reason))
                continue
            name, question = (line[file_column] or "").strip(), (line[question_column] or "").strip()
            if not name or not question:
                problems.append(Problem(f"{table}:{lines.line_num}", "no file name" if not name else "no question"))
                continue
            _, answers = groups.setdefault((name, question), (lines.line_num, []))
            answers += [answer for answer in ((line[column] or "").strip() for column in answer_columns) if answer]
    rows: list[Example] = []
    for (name, question), (number, answers) in groups.items():
        where = f"{table}:{number}"
        try:
            audio = next((folder / name for folder in folders if is_file(folder / name)), None)
        except ValueError as error:
            problems.append(Problem(where, str(error)))
            continue
        if not answers:
            problems.append(Problem(where, "no answer"))
        elif audio is None:
            problems.append(Problem(where, f"no audio {name} in {', '.join(str(folder) for folder in folders)}"))
        else:
            counts = Counter(answer.casefold() for answer in answers)
            text = max(answers, key=lambda answer: counts[answer.casefold()])
            rows.append(Example(str(audio), text, prompt=question, id=f"{name}#{number}", answers=tuple(answers), where=where))
    return Corpus(rows, problems, str(table))


def _table(path: Path, split: str | None) -> Path:
    if not path.is_dir():
        return path
    tables = {table.stem.removeprefix("clotho_aqa_"): table for table in sorted(path.glob("clotho_aqa_*.csv"))}
    if split is None and len(tables) == 1:
        return next(iter(tables.values()))
    if split not in tables:
        raise ValueError(f"split must be one of {', '.join(tables) or '(no clotho_aqa_*.csv is there)'} for {path}, got {split!r}")
    return tables[split]


def _header(table: Path) -> list[str]:
    with _opened(table) as file:
        try:
            return next(csv.reader(file), [])
        except csv.Error:  # no table, however it is called
            return []


def _opened(table: Path) -> TextIO:
    """Bytes that are not UTF-8 come as lone surrogates, which `_check_utf8` finds: one bad row must not stop the others."""
    return open(table, encoding="utf-8-sig", newline="", errors="surrogateescape")


def _printable(header: list[str]) -> str:
    return ", ".join(header).encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")


def _check_utf8(line: Mapping[str, str | None], columns: Sequence[str]) -> None:
    """ValueError, naming the column, for a row with bytes that are not UTF-8."""
    for column in columns:
        try:
            decoded((line[column] or "").encode("utf-8", errors="surrogateescape"))
        except ValueError as error:
            raise ValueError(f"{column} is {error}") from error


def _columns(header: list[str]) -> tuple[str, str, list[str]] | None:
    """The columns of file, question and answers, in the table's own spelling; None if one is not there."""
    file = next((name for name in header if name.strip().lower() in _FILE), None)
    question = next((name for name in header if name.strip().lower() in _QUESTION), None)
    answers = [name for name in header if name.strip().lower().startswith("answer")]
    return (file, question, answers) if file and question and answers else None
