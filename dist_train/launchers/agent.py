"""Waits for an agent (torchrun's, accelerate's), and kills one that waits in vain for a lost node."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

_POLL_SECONDS = 1.0


def wait(agent: subprocess.Popen[bytes], patience: float) -> int:
    """Waits for the agent to end, and returns its exit code.

    An agent notices the end of a rank within a second, unless it gives other ranks their time after SIGTERM, or waits
    for the rendezvous. If that is on a node that was lost, the agent obeys neither its own timeout nor SIGTERM. That
    lasts until the kernel closes the connection, about 15 minutes later (torch 2.14's TCPStore; tcp_retries2).

    Args:
        patience: seconds after which an agent that has not noticed the end of a rank is killed, with its other ranks.
    """
    unnoticed: float | None = None
    while True:
        try:
            return agent.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        if not _has_unnoticed(agent.pid):
            unnoticed = None
            continue
        unnoticed = unnoticed or time.monotonic()
        if time.monotonic() - unnoticed > patience:
            print(
                f"dist-train: a rank ended {patience:.0f} s ago, but its agent still waits for another node: killed",
                file=sys.stderr,
            )
            _kill(agent)


def _has_unnoticed(agent: int) -> bool:
    """Tells whether a child of the agent has ended, and the agent has not asked for its exit code."""
    try:
        children = psutil.Process(agent).children()
    except psutil.NoSuchProcess:
        return False
    return any(_status(child) == psutil.STATUS_ZOMBIE for child in children)


def _status(process: psutil.Process) -> str:
    try:
        status: str = process.status()
    except psutil.NoSuchProcess:
        return ""
    return status


def _kill(agent: subprocess.Popen[bytes]) -> None:
    try:
        family = psutil.Process(agent.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    agent.kill()
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
