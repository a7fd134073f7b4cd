"""An agent that works is waited for; one that waits for a lost node is killed, with its ranks."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from dist_train.launchers.agent import wait

# Two ranks, of which the first ends at once; its agent notices that after `sys.argv[1]` seconds, and then ends.
AGENT = """
import subprocess, sys, time
ended, other = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "300"])
print(other.pid, flush=True)
time.sleep(float(sys.argv[1]))
ended.wait()
other.kill()
other.wait()
sys.exit(7)
"""


@contextmanager
def agent(seconds: float) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """The agent, and its rank that goes on."""
    process = subprocess.Popen([sys.executable, "-c", AGENT, str(seconds)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    rank = psutil.Process(int(process.stdout.readline()))
    try:
        yield process, rank
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()
        if rank.is_running():
            rank.kill()


def test_an_agent_that_does_not_notice_for_long_that_a_rank_ended_is_killed_with_the_others(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with agent(300) as (process, rank):
        assert wait(process, patience=1.0) == -9
        end = time.monotonic() + 30
        while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, "the other rank goes on"
            time.sleep(0.02)
    assert "its agent still waits for another node: killed" in capfd.readouterr().err


def test_an_agent_that_notices_late_but_in_time_is_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with agent(1.5) as (process, _):
        assert wait(process, patience=120.0) == 7
    assert capfd.readouterr().err == ""
