"""Shared memory, through which worker processes hand over their batches."""

from __future__ import annotations

import os
from pathlib import Path

SHM = Path("/dev/shm")
PREFETCH = 4
"""Batches that each worker makes ahead."""
HINT = "docker run --shm-size=8g (or --ipc=host); or --data.workers 0"


def sizes(path: Path = SHM) -> tuple[int, int]:
    """Returns all bytes of a file system, and the bytes free for us.

    Raises:
        OSError: there is none.
    """
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def needed(workers: int, batch_bytes: int) -> int:
    """Returns the bytes that workers fill at most: the batches made ahead, and the one that the rank reads."""
    return (workers * PREFETCH + 1) * batch_bytes if workers else 0


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size >= 2**20 or not size else f"{size / 2**20:.2g} MiB"


def described() -> str:
    """Returns "/dev/shm: 64 MiB, 10 MiB free", or that it is not there."""
    try:
        size, free = sizes()
    except OSError:
        return f"{SHM} is not there"
    return f"{SHM}: {mebibytes(size)}, {mebibytes(free)} free"
