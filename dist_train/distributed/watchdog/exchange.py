"""The evidence about one rank's process, and the exchange of the watchers' reports through the run directory."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from dist_train.distributed.polling import attempts
from dist_train.distributed.watchdog.rank_side import STACK_SIGNAL
from dist_train.distributed.watchdog.verdict import Report
from dist_train.errors import DistTrainError
from dist_train.run_dir.files import read_json, replace_json

_GATHER_SECONDS = 8.0  # how long to wait for the reports of all ranks
_STACKS_SECONDS = 3.0


def say(text: str) -> None:
    print(f"dist-train: {text}", file=sys.stderr, flush=True)


def ask_for_stacks(pid: int, file: int) -> str:
    """Returns a rank's Python stacks, which faulthandler writes on a signal; "" if the process cannot run.

    file: descriptor of the file that they are written to.
    """
    before = size = os.fstat(file).st_size
    with suppress(ProcessLookupError):
        os.kill(pid, STACK_SIGNAL)
    end = time.monotonic() + _STACKS_SECONDS
    while time.monotonic() < end:
        time.sleep(0.1)  # long enough for a file that does not grow to be complete
        now = os.fstat(file).st_size
        if now > before and now == size:  # the file has stopped growing
            break
        size = now
    return os.pread(file, size - before, before).decode(errors="replace")


def state_of(pid: int) -> str:
    """Returns the kernel's state of a process: R running, S sleeping, D in the kernel (disk), T stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # no /proc on this system, or the process has just ended
        return "?"


def gather(folder: Path, own: Report, world_size: int) -> list[Report]:
    """Writes this rank's report, and returns the reports of all ranks that arrive in time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_json(folder / f"rank{own.rank}.json", vars(own))
        for _ in attempts(_GATHER_SECONDS):
            if len(list(folder.glob("rank*.json"))) >= world_size:
                break
        return [Report(**read_json(file)) for file in sorted(folder.glob("rank*.json"))]
    except (OSError, DistTrainError) as error:
        say(f"rank {own.rank} cannot write its report for the other ranks: {error}")
        return [own]


def keep_stacks(folder: Path, rank: int, stacks: str) -> None:
    """Writes a rank's stacks, for the user."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank{rank}.txt").write_text(stacks or "this process could not run, so it wrote no stack\n")
    except OSError as error:
        say(f"the stacks of rank {rank} cannot be written: {error}")
