"""What an unknown name was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "nearest"]

# A typing mistake keeps most letters; half of them is a word that is meant for something else as well.
ALIKE = 0.6


def nearest(name: object, known: Iterable[str], alike: float = ALIKE) -> str | None:
    """The one of ``known`` that is most like ``name``, None if none is at least ``alike``, difflib's ratio between 0 and 1."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=alike)), None)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of an error message, " (did you mean 'pool'?)", or nothing."""
    found = nearest(name, known)
    return "" if found is None else f" (did you mean {found!r}?)"
