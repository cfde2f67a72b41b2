"""Ctrl-C while libraries are imported, which takes seconds."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["INTERRUPTED", "leaving_at_once"]

INTERRUPTED = 130  # the exit status


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Within it, Ctrl-C ends the process with one line instead of a traceback."""
    before = signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(signal_number: int, frame: FrameType | None) -> None:
    # At once: an exception could be caught by whatever is being imported, and nothing is there yet that would need closing.
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)
