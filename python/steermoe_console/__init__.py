"""The console script ``steermoe``: outside that package, which needs libraries that the kernels do without, and seconds to be imported.

Arguments are read, and help is given, before that.
"""

from __future__ import annotations

import sys

from .interrupt import leaving_at_once

__all__ = ["main"]


def main() -> None:
    """`steermoe_console.cli.main`; exits with 1 and a sentence if the libraries for reading arguments are missing."""
    try:
        with leaving_at_once():
            from .cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"error: the command line needs {error.name}: pip install 'steermoe-kernels[system]'")
    run()
