"""The console script ``steermoe``: outside that package, whose imports take seconds in which Ctrl-C must not print a traceback, and need
libraries that the kernels do without."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """`steermoe.cli.main`; while that is imported, one line for Ctrl-C (exit status 130) and for a library that is missing (1)."""
    before = signal.signal(signal.SIGINT, _leave)
    try:
        from steermoe.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")
    signal.signal(signal.SIGINT, before)
    run()


def _leave(signal_number: int, frame: FrameType | None) -> None:
    # At once: an exception could be caught by whatever is being imported, and nothing is there yet that would need closing.
    os.write(2, b"interrupted\n")
    os._exit(130)
