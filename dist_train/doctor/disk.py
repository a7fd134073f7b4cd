"""Checks the disk under the run directory: free space, permission, and the time of an fsync."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dist_train.config.data import DataConfig
from dist_train.data.datasets.args import cache_folder
from dist_train.doctor.base import Line, Subject, bad, good, warning
from dist_train.errors import SetupError

_ROUNDS = 7
_SLOW_SECONDS = 0.1
_LITTLE, _FULL = 5 * 2**30, 200 * 2**20  # bytes: a few checkpoints of a ResNet-50; one


def check(subject: Subject) -> Iterator[Line]:
    yield from _of_run(subject)
    try:
        cache_folder(DataConfig())
    except SetupError as error:
        yield warning(error.message, error.hint)


def _of_run(subject: Subject) -> Iterator[Line]:
    run_dir = Path(subject.run_dir).absolute()
    folder = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    text = f"{subject.run_dir}: {free / 2**30:.1f} GiB free"
    hint = "--run.dir DIR, on a larger disk"
    if free < _FULL:
        yield bad(f"{text}: no room for checkpoints", hint)
        return
    yield warning(f"{text}: little for checkpoints", hint) if free < _LITTLE else good(text)
    try:
        seconds = statistics.median(_fsync_seconds(folder))
    except OSError as error:
        yield bad(f"{folder} cannot be written to: {error.strerror}", "--run.dir DIR, one that you can write to")
        return
    text = f"fsync there: {seconds * 1e3:.1f} ms (median of {_ROUNDS})"
    hint = "checkpoints will take long: --run.dir DIR on a faster disk, or a larger --checkpoint.every_steps"
    yield warning(text, hint) if seconds > _SLOW_SECONDS else good(text)


def _fsync_seconds(folder: Path) -> list[float]:
    """Times the fsync of 64 KiB, several times."""
    found = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_ROUNDS):
            file.write(bytes(2**16))
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            found.append(time.perf_counter() - start)
    return found
