"""The command line: parses what is typed and calls one function."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; see `dist_train.cli.program.main`."""
    from dist_train.cli.program import main as run

    return run(arguments)
