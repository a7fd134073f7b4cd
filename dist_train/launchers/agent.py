"""Waiting for an agent (torchrun's, accelerate's), also for one that waits in vain for a node that is gone."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

_POLL_SECONDS = 1.0


def wait(agent: subprocess.Popen[bytes], patience: float) -> int:
    """The agent's exit code.

    An agent takes notice of a rank that ended within a second, unless it gives others their time after SIGTERM, or waits for an
    answer of the rendezvous. Where that is on a node that is gone without a word, it is deaf to its own timeout and to SIGTERM
    until the kernel gives the connection up, in about a quarter of an hour (seen with torch 2.14's TCPStore; tcp_retries2).

    Args:
        patience: seconds after which an agent that leaves an ended rank unnoticed is killed, with its other ranks.
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
                f"dist-train: a rank ended {patience:.0f} s ago, and its agent still waits for another node: killed",
                file=sys.stderr,
            )
            _kill(agent)


def _has_unnoticed(agent: int) -> bool:
    """Whether a child of the agent has ended without the agent having asked for its exit code."""
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
