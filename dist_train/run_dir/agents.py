"""Remembers which restarts by torchrun's agents go on with a run that was stopped.

An agent starts its ranks again when another node joins, with the same number of restarts, and when a rank failed, with
the next number. After a stop the first goes on. The second does not: a rank had to be killed then, which an agent takes
for a failure. The exception are ranks that ended so that their agent goes on without a node that left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.processes import start_of, this_machine
from dist_train.run_dir.status import read_status


def restart_mark(run_dir: RunDir, environ: Mapping[str, str], more: int = 0) -> Path:
    """Returns the file by which this agent's ranks go on after a stop, at its number of restarts now, plus `more`."""
    agent = os.getppid()
    count = int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")) + more
    return run_dir.agent_mark(f"{this_machine()}-{agent}-{start_of(agent)}-{count}")


def let_go_on(run_dir: RunDir, environ: Mapping[str, str], more: int = 0) -> None:
    """Makes the file, on a rank. Where the disk does not take it, the same command goes on."""
    mark = restart_mark(run_dir, environ, more)
    with suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def stopped_under_this_agent(run_dir: RunDir, environ: Mapping[str, str]) -> bool:
    """Tells if torchrun's agent restarted this rank although the ranks before it had ended as they were asked to.

    A stop from before the agent began does not count.
    """
    if environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    fields = read_status(run_dir)
    if fields is None or fields["state"] != "preempted":
        return False
    if run_dir.status.stat().st_mtime <= psutil.Process(os.getppid()).create_time():
        return False
    return not restart_mark(run_dir, environ).exists()
