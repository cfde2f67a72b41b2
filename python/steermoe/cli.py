"""The command line for ``python -m steermoe.cli``, as launchers of several processes call it. It is `steermoe_console.cli`."""

from __future__ import annotations

from steermoe_console.cli import app, main

__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
