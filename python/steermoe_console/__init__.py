"""The console script ``steermoe``: outside that package, whose imports take seconds in which Ctrl-C must not print a traceback."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """`steermoe.cli.main`, and exit status 130 with one line for Ctrl-C while it is imported."""
    before = signal.signal(signal.SIGINT, _leave)
    from steermoe.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


def _leave(signal_number: int, frame: FrameType | None) -> None:
    # At once: an exception could be caught by whatever is being imported, and nothing is there yet that would need closing.
    os.write(2, b"interrupted\n")
    os._exit(130)
