"""Identifies processes across machines and time: a pid means something on its machine only, and is used again."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
from contextlib import suppress
from pathlib import Path

import psutil


@functools.cache
def this_machine() -> str:
    """Identifies this boot of this kernel, and the PID namespace: containers may share a host name."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def start_of(pid: int) -> int | None:
    """Returns when a process began, in a unit of this machine that no change of its clock moves; None if it is gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return None if state in "ZX" else int(fields[18])  # 22 of proc(5), counted from the state
    except (OSError, ValueError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        return int(psutil.Process(pid).create_time())
    except (psutil.Error, OverflowError):
        return None
