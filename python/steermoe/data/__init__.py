"""Corpora: `load` reads any kind, `Collator` makes batches of them, `check` says what is wrong with one.

A JSONL manifest has one JSON object a line:

=================  =====================================================================================================
``audio_filepath`` the audio file, absolute or relative to the manifest's folder; required
``text``           the transcript, or the answer to ``prompt``; null or missing: the row can be transcribed, not learnt from
``duration``       seconds of audio from ``offset`` on; missing: to the end of the file
``offset``         seconds into the file at which the row begins; missing: 0
``prompt``         what the user turn says, with or without <|audio|>; missing: the prompt of the run
``answers``        every answer that counts as right, a list of strings; missing: ``text`` alone
``id``             the row's name in reports; missing: ``audio_filepath``, and the offset if there is one
=================  =====================================================================================================

Any other field is kept in ``Example.extra``. Kinds of corpus are modules in this folder, one each, found by what they define:

``LOOKED_FOR: str``
    What a path of this kind looks like, for the message when no kind takes a path.
``PRIORITY: int`` and ``takes(path) -> bool``
    Of the modules that take a path, the one with the highest priority reads it: 10 for a file type, 20 for a folder's layout, 30 for what
    cannot be mistaken. ``takes`` looks at names, not into audio.
``read(path, **options) -> Corpus``
    The rows in a fixed order, bad ones in ``problems``. Its keyword arguments, with defaults, are the options of this kind; those annotated
    with str, int, float, bool, None or a union of these are checked before the call. The path is there, except where the module defines
    ``REMOTE = True``: then it may name something on a hub.

The module's name is the ``kind`` that a specification may give. What the kinds have in common:

- ``split`` picks a part of the corpus as its publisher names it ("test-clean"), and one that is not there is an error that lists those that
  are; ``audio_dir`` is where audio lies, if not beside the table.
- A bad row never stops the others: it becomes a `Problem`. ``where`` of examples and problems is "FILE:LINE"; the audio file's path for
  audio that no line names, "PATH[INDEX]" where there are no lines.
- `corpus.numbered_lines` gives a text file's lines with their numbers, `corpus.decoded` a line's text, and `corpus.is_file` whether a row's
  file is there; the latter two raise the ValueError that a problem's reason is made of.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from ..suggestions import did_you_mean
from .audio import Audio, AudioError, load_audio, read_audio, split_at_quiet
from .bucketing import LengthBucketSampler
from .collator import TRANSCRIPTION_PROMPT, Collator
from .corpus import BadRowLog, Corpus, Example, Joined, Problem, TooManyBadRows, WithPrompt

__all__ = [
    "TRANSCRIPTION_PROMPT",
    "Audio",
    "AudioError",
    "BadRowLog",
    "Collator",
    "Corpus",
    "Example",
    "LengthBucketSampler",
    "Problem",
    "TooManyBadRows",
    "kinds",
    "load",
    "load_audio",
    "read_audio",
    "split_at_quiet",
]

# Types of options: what a message calls them, and what is taken for them.
_PLAIN: dict[Any, tuple[str, tuple[type, ...]]] = {
    str: ("a string", (str, os.PathLike)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    bool: ("true or false", (bool,)),
    type(None): ("null", (type(None),)),
}

Specification: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any]"


def load(spec: Specification, *, allow_empty: bool = False) -> Corpus:
    """The corpus that ``spec`` names: a path, a mapping, or a list of those, joined in order.

    A mapping has ``path`` and may have ``kind`` (else told from what is there), ``prompt`` (for rows without one), ``first`` (only so many
    rows) and the options of its kind. FileNotFoundError for a path that is not there; ValueError for one that no kind takes, saying what
    was looked for, for an unknown kind or option, for a corpus without any row, and, unless ``allow_empty``, for one without a single
    usable row, naming the first bad ones. TypeError for a value of another type than a string where one is needed.
    """
    if isinstance(spec, Mapping):
        return _load_one(dict(spec), allow_empty)
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        if not spec:
            raise ValueError("spec must name at least one corpus, got an empty list")
        parts = [load(part, allow_empty=allow_empty) for part in spec]
        name = ", ".join(part.name for part in parts)
        return parts[0] if len(parts) == 1 else Corpus(Joined(parts), chain.from_iterable(part.problems for part in parts), name)
    if isinstance(spec, str | os.PathLike):
        return _load_one({"path": spec}, allow_empty)
    raise TypeError(f"spec must be a path, a mapping with 'path', or a list of those, got {type(spec).__name__}")


def kinds() -> Mapping[str, ModuleType]:
    """Every kind of corpus by name, the highest priority first."""
    return _kinds()


@cache
def _kinds() -> dict[str, ModuleType]:
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = sorted((module for module in modules if hasattr(module, "takes")), key=lambda module: -module.PRIORITY)
    return {module.__name__.rpartition(".")[2]: module for module in found}


def _load_one(spec: dict[str, Any], allow_empty: bool) -> Corpus:
    if "path" not in spec:
        raise ValueError(f"a corpus needs 'path', got only {', '.join(map(repr, spec)) or 'an empty mapping'}")
    path, kind, prompt, first = spec.pop("path"), spec.pop("kind", None), spec.pop("prompt", None), spec.pop("first", None)
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"a corpus's path must be a string, got {path!r}")
    for name, value in (("kind", kind), ("prompt", prompt)):
        if value is not None and not isinstance(value, str):
            raise TypeError(f"a corpus's {name} must be a string, got {value!r}")
    if first is not None and (isinstance(first, bool) or not isinstance(first, int) or first < 1):
        raise ValueError(f"first must be a positive number of rows, got {first!r}")
    module = _named(kind) if kind is not None else _told(Path(path))
    if not getattr(module, "REMOTE", False):
        _check_exists(Path(path))
    _check_options(module, spec)
    corpus: Corpus = module.read(path, **spec)
    if not len(corpus) and not corpus.problems:
        raise ValueError(f"{path} has no rows; looked for {module.LOOKED_FOR}")
    if not len(corpus) and not allow_empty:
        listed = "".join(f"\n  {problem}" for problem in corpus.problems[:5])
        raise ValueError(f"{path} has no usable row: {len(corpus.problems)} bad ones{listed}")
    if prompt is not None:
        corpus = Corpus(WithPrompt(corpus, prompt), corpus.problems, corpus.name)
    return corpus if first is None else corpus[:first]


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}")


def _named(kind: str) -> ModuleType:
    if kind not in _kinds():
        raise ValueError(f"kind must be one of {', '.join(sorted(_kinds()))}, got {kind!r}{did_you_mean(kind, _kinds())}")
    return _kinds()[kind]


def _told(path: Path) -> ModuleType:
    _check_exists(path)
    module = next((module for module in _kinds().values() if module.takes(path)), None)
    if module is None:
        looked_for = "".join(f"\n  {name}: {module.LOOKED_FOR}" for name, module in sorted(_kinds().items()))
        raise ValueError(f"no kind of corpus takes {path}; looked for{looked_for}")
    return module


def _check_options(module: ModuleType, options: Mapping[str, Any]) -> None:
    known = [name for name in inspect.signature(module.read).parameters if name != "path"]
    hints = typing.get_type_hints(module.read)
    for name, value in options.items():
        if name not in known:
            every = sorted([*known, "kind", "path", "prompt", "first"])
            kind = module.__name__.rpartition(".")[2]
            raise ValueError(f"a corpus of kind {kind} has no option {name!r}; it has {', '.join(every)}{did_you_mean(name, every)}")
        _check_type(name, value, hints.get(name, Any))


def _check_type(name: str, value: Any, hint: Any) -> None:
    """TypeError for a value that is none of the plain types in ``hint``; a ``hint`` with other types is the kind's own to check."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if not all(choice in _PLAIN for choice in choices):
        return
    accepted: Any = tuple(kind for choice in choices for kind in _PLAIN[choice][1])
    # To Python a bool is an int.
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in choices):
        wanted = " or ".join(_PLAIN[choice][0] for choice in choices if choice is not type(None))
        raise TypeError(f"a corpus's {name} must be {wanted}, got {value!r}")
