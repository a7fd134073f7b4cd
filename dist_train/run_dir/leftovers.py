"""Names temporary files by their writer, and removes those whose writer is gone."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from dist_train.run_dir.processes import start_of, this_machine

_NAME = re.compile(r"\..+\.tmp")
_WRITER = re.compile(r"\..+\.(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<started>\d+)\.[0-9a-f]{8}\.tmp")
_SILENT_SECONDS = 24 * 3600.0
"""A file of a writer that this machine cannot see is left over when nothing was written to it for so long."""


def beside(path: Path) -> Path:
    """Returns a new hidden name beside `path` that tells who writes it: machine, process, its start."""
    # Two ranks may write one file (status.json, at a failure), on two nodes even with the same process id.
    return path.with_name(
        f".{path.name}.{this_machine()}-{os.getpid()}-{start_of(os.getpid())}.{uuid.uuid4().hex[:8]}.tmp"
    )


def remove_leftovers(*folders: Path) -> None:
    """Removes the temporary files and folders in `folders` whose writer is gone; skips folders that do not exist.

    A process of this machine is asked for. One of another machine, or of a version that gave no such names, is gone
    when its file was not written to for a day, by the clock of the file system.
    """
    for folder in folders:
        with suppress(OSError):  # what cannot be removed now is left to the next start
            for entry in list(folder.iterdir()):
                if _NAME.fullmatch(entry.name) and _gone(entry):
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _gone(entry: Path) -> bool:
    match = _WRITER.fullmatch(entry.name)
    if match is None or match["machine"] != this_machine():
        files = [entry, *entry.iterdir()] if entry.is_dir() else [entry]
        return _now(entry.parent) - max(file.lstat().st_mtime for file in files) > _SILENT_SECONDS
    return start_of(int(match["pid"])) != int(match["started"])


def _now(folder: Path) -> float:
    """Returns the time of the folder's file system, which may be another machine's."""
    probe = beside(folder / "clock")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
