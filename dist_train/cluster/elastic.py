"""Reads, in a rank under torchrun, how its agent deals with nodes that come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import psutil

_DEFAULT_PORT = 29400  # torch/distributed/elastic/rendezvous/c10d_rendezvous_backend.py
_PROGRAMS = ("torchrun", "torch.distributed.run")


@dataclass(frozen=True)
class Agent:
    """The agent of this rank's node, among those of the job.

    Attributes:
        node: this node's number, 0 .. nodes - 1; another one after each meeting.
        nodes: number of nodes now.
        least, most: numbers of nodes with which the agents go on; equal where their number is fixed.
        restarts: how often this agent may still start failed ranks again.
        hosts: True if this agent hosts the rendezvous, without which no agents meet.
        told_by: names of the signals that the agent passes on to its ranks.
    """

    node: int = 0
    nodes: int = 1
    least: int = 1
    most: int = 1
    restarts: int = 0
    hosts: bool = False
    told_by: tuple[str, ...] = ()

    @property
    def elastic(self) -> bool:
        """Tells whether nodes may join and leave."""
        return self.least < self.most

    @property
    def may_go_on(self) -> bool:
        """Tells whether the ranks of this node could go on without one of the other nodes."""
        return self.least < self.nodes and self.restarts > 0


def agent_of(environ: Mapping[str, str]) -> Agent:
    """Returns the agent that started this process, by its variables and its command line."""
    if "TORCHELASTIC_RUN_ID" not in environ:
        return Agent()
    process, words = _found()
    return plan_of(words, environ, [] if process is None else _listening(process))


def plan_of(words: Sequence[str], environ: Mapping[str, str], listening: Sequence[int]) -> Agent:
    """Returns the agent with the command line `words`, the ranks' variables and the ports at which it listens."""
    nodes = int(environ.get("GROUP_WORLD_SIZE", "1"))
    least, _, most = _option("nnodes", words, environ).partition(":")
    known = least.isdecimal() and most.isdecimal()
    left = int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    port = _option("rdzv-endpoint", words, environ).rpartition(":")[2]
    hosts = _option("rdzv-backend", words, environ) == "c10d"
    return Agent(
        node=int(environ.get("GROUP_RANK", "0")),
        nodes=nodes,
        least=int(least) if known else nodes,
        most=int(most) if known else nodes,
        restarts=left,
        hosts=hosts and (int(port) if port.isdecimal() else _DEFAULT_PORT) in listening,
        told_by=tuple(name.strip() for name in environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM").split(",")),
    )


def _option(name: str, words: Sequence[str], environ: Mapping[str, str]) -> str:
    """Returns the value of an option of torchrun, which also reads PET_NAME; "" where it is not given."""
    spellings = [f"--{name}", f"--{name.replace('-', '_')}"]
    for word, after in pairwise([*words, ""]):
        if word in spellings:
            return after
        for spelling in spellings:
            if word.startswith(f"{spelling}="):
                return word.removeprefix(f"{spelling}=")
    return environ.get(f"PET_{name.replace('-', '_').upper()}", "")


def _found() -> tuple[psutil.Process | None, list[str]]:
    """Returns torchrun's process and its words; (None, []) where no parent of this process is one."""
    with suppress(psutil.Error):
        for process in psutil.Process().parents():
            words = process.cmdline()
            if any(word.rpartition("/")[2] in _PROGRAMS for word in words[:8]):
                return process, words
    return None, []


def _listening(process: psutil.Process) -> list[int]:
    """Returns the TCP ports at which a process listens."""
    with suppress(psutil.Error):
        found = process.net_connections("tcp")
        return [each.laddr.port for each in found if each.status == psutil.CONN_LISTEN]
    return []
