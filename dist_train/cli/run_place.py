"""The argument RUN_DIR of verbs about a run: a folder, or an address at an object store. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dist_train.addresses import is_address, place
from dist_train.errors import RunDirError, did_you_mean

DIRECTORY = click.Path(file_okay=False, path_type=Path)  # a shell completes folders


class RunPlace(click.Path):
    """The type of a run's place. Of an address the verb gets the working copy on this machine.

    Args:
        changes: the verb writes to the run directory; that is brought back to the store at its end.
    """

    def __init__(self, changes: bool = False) -> None:
        super().__init__(file_okay=False, path_type=Path)
        self._changes = changes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str):
            value = place(value)
        if not isinstance(value, str) or not is_address(value) or ctx is None or ctx.resilient_parsing:
            return super().convert(value, param, ctx)
        from dist_train.run_dir.working_copy import opened

        return ctx.with_resource(opened(value, changes=self._changes))


class ArtifactPlace(click.Path):
    """The type of an artifact's place. Of an address the verb gets a copy on this machine."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str):
            value = place(value)
        if not isinstance(value, str) or not is_address(value) or ctx is None or ctx.resilient_parsing:
            return super().convert(value, param, ctx)
        from dist_train.artifact.fetch import fetch_artifact

        return fetch_artifact(value)


def known_run_dir(run_dir: Path) -> Path:
    """Returns the directory of a run; raises RunDirError where it has neither config.yaml nor checkpoints."""
    if not (run_dir / "config.yaml").is_file() and not (run_dir / "checkpoints").is_dir():
        what = "has no config.yaml: it is no run directory" if run_dir.is_dir() else "does not exist"
        known = [str(found.parent) for found in sorted(run_dir.parent.glob("*/config.yaml"))]
        hint = did_you_mean(str(run_dir), known) or "give the directory of a run, runs/NAME"
        raise RunDirError(f"{run_dir} {what}", hint)
    return run_dir


def run_dirs(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Callback of an argument RUN_DIR, once or repeated; raises RunDirError."""
    return tuple(map(known_run_dir, value)) if isinstance(value, tuple) else known_run_dir(value)
