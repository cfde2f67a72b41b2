"""JSONL manifests: one JSON object a line. The fields are described in the package's docstring."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .corpus import Corpus, Example, Problem, decoded, is_file, lone_surrogate, numbered_lines

PRIORITY = 10
LOOKED_FOR = "a .jsonl, .ndjson or .json file with one JSON object a line, or a folder with a manifest.jsonl"

FIELDS = ("audio_filepath", "text", "duration", "offset", "prompt", "answers", "id")
# Some thirty years. What is beyond is a mistake, and past the range in which samples can be counted.
LONGEST_SECONDS = 10**9
_SUFFIXES = {".jsonl", ".ndjson", ".json"}


def takes(path: Path) -> bool:
    return (path / "manifest.jsonl").is_file() if path.is_dir() else path.suffix.lower() in _SUFFIXES


def read(path: str | os.PathLike[str], *, audio_dir: str | None = None, where: Mapping[str, Any] | None = None) -> Corpus:
    """The rows of the manifest at ``path``; broken lines become problems named by file and line number.

    ``audio_dir`` is what relative paths are relative to, instead of the manifest's folder. ``where`` keeps the rows whose fields have these
    values, as in {"split": "train"}; a list of values allows each. TypeError for a ``where`` that is no mapping.
    """
    if where is not None and not isinstance(where, Mapping):
        raise TypeError(f"where must be a mapping of fields to values, as in {{'split': 'train'}}, got {where!r}")
    manifest = Path(path)
    manifest = manifest / "manifest.jsonl" if manifest.is_dir() else manifest
    base = Path(audio_dir) if audio_dir is not None else manifest.parent
    rows: list[Example] = []
    problems: list[Problem] = []
    for number, line in numbered_lines(manifest):
        try:
            row = _parse(line)
            if where is None or _matches(row, where):
                rows.append(_example(row, base, f"{manifest}:{number}"))
        except ValueError as error:
            problems.append(Problem(f"{manifest}:{number}", str(error)))
    return Corpus(rows, problems, str(manifest))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(decoded(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not a flat JSON object (nested too deeply)") from error
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, got {type(row).__name__}")
    for name, value in row.items() if b"\\u" in line else ():
        if fault := lone_surrogate(json.dumps([name, value], ensure_ascii=False)):
            raise ValueError(f"field {name!r} holds {fault}")
    return row


def _matches(row: dict[str, Any], where: Mapping[str, Any]) -> bool:
    return all(row.get(name) in (value if isinstance(value, list | tuple) else [value]) for name, value in where.items())


def _example(row: dict[str, Any], base: Path, where: str) -> Example:
    name = _string(row, "audio_filepath")
    if not name:
        raise ValueError(f"audio_filepath is missing; the row has {', '.join(row) or 'no field'}")
    path = base / name
    if not is_file(path):
        raise ValueError(f"audio_filepath {path} is not there")
    fields = stated(row)
    fields["id"] = fields["id"] if fields["id"] is not None else name + (f"@{fields['offset']:g}" if fields["offset"] else "")
    extra = {name: value for name, value in row.items() if name not in FIELDS}
    return Example(audio=str(path), extra=extra, where=where, **fields)


def stated(row: Mapping[str, Any], text_name: str = "text") -> dict[str, Any]:
    """What a row says beside its audio: `Example`'s ``text``, ``prompt``, ``offset``, ``duration``, ``answers`` and ``id``.

    Text, prompt, duration and id are None where the row has none. ``text_name`` is what messages call its text. ValueError, naming the
    field, for a value that is not what it should be.
    """
    answers = row.get("answers") or []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"answers must be a list of strings, got {reprlib.repr(answers)}")
    identity = row.get("id")
    if identity is not None and not isinstance(identity, str | int):
        raise ValueError(f"id must be a string or a whole number, got {reprlib.repr(identity)}")
    duration = _seconds(row, "duration")
    if duration == 0:
        raise ValueError("duration must be positive, got 0")
    text = _string(row, "text", text_name)
    return {
        "text": text if text is not None or not answers else answers[0],
        "prompt": _string(row, "prompt"),
        "offset": _seconds(row, "offset") or 0.0,
        "duration": duration,
        "answers": tuple(answers),
        "id": str(identity) if identity is not None else None,
    }


def _string(row: Mapping[str, Any], name: str, shown: str | None = None) -> str | None:
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{shown or name} must be a string, got {reprlib.repr(value)}")
    return value


def _seconds(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LONGEST_SECONDS:
        raise ValueError(f"{name} must be a number of seconds, 0 or more and at most {LONGEST_SECONDS}, got {reprlib.repr(value)}")
    return float(value)
