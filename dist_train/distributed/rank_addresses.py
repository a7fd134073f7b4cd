"""Compares the ranks before they connect: their addresses, numbers and GPUs.

Imports no torch. Observed with torch 2.14 on two network namespaces: gloo listens at the address that the host name
resolves to. If that is a loopback address on two machines, each rank connects to itself and is refused, and the other
ranks wait until the timeout. Of two ranks, the one with the higher address connects to the other (gloo's tcp/pair.cc).
One machine with a loopback address is therefore harmless if all other machines have lower addresses.
"""

from __future__ import annotations

import ipaddress
import json
import os
import platform
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from dist_train.cluster.interfaces import gloo_address, interfaces, is_loopback
from dist_train.cluster.rank_plan import RankPlan
from dist_train.distributed.polling import attempts
from dist_train.errors import SetupError

_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Store(Protocol):
    """The methods of torch's Store that the preflight uses."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class RankAddress:
    """A rank's address in the network.

    Attributes:
        machine: identifies the machine; ranks with equal values reach each other by a loopback address.
        address: the address at which gloo would listen; "" if it cannot be determined.
        named: value of GLOO_SOCKET_IFNAME.
        others: names of the interfaces that reach other machines.
        gpu: identity of the rank's GPU; "" on the CPU.
    """

    rank: int
    host: str
    machine: str
    address: str
    named: str = ""
    others: tuple[str, ...] = ()
    local_rank: int = 0
    gpu: str = ""


def rank_address(plan: RankPlan, environ: Mapping[str, str], gpu: str = "") -> RankAddress:
    """Returns this rank's address, as gloo will choose it."""
    present = interfaces()
    return RankAddress(
        plan.rank,
        socket.gethostname(),
        _machine(),
        gloo_address(environ, present),
        environ.get("GLOO_SOCKET_IFNAME", ""),
        tuple(each.name for each in present if each.reaches_others),
        plan.local_rank,
        gpu,
    )


def _machine() -> str:
    """Returns the kernel's boot id and the network namespace; without /proc, the host name."""
    try:
        return f"{_BOOT.read_text().strip()}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return platform.node()


def unreachable(ranks: Sequence[RankAddress]) -> SetupError | None:
    """Returns the error if some rank would connect to itself instead of to another machine; else None."""
    by_machine: dict[str, RankAddress] = {}
    for each in ranks:
        if each.address:
            by_machine.setdefault(each.machine, each)
    for one in by_machine.values():
        for other in by_machine.values():
            if one.machine != other.machine and is_loopback(one.address) and not _lower(other.address, one.address):
                return _connects_to_itself(one, other)
    return None


def _lower(first: str, second: str) -> bool:
    pair = ipaddress.ip_address(first.partition("%")[0]), ipaddress.ip_address(second.partition("%")[0])
    return pair[0].version == pair[1].version and pair[0].packed < pair[1].packed


def _connects_to_itself(one: RankAddress, other: RankAddress) -> SetupError:
    through = f"{one.others[0]} there" if one.others else "the interface that the other nodes reach"
    why = (
        f"GLOO_SOCKET_IFNAME is {one.named} on {one.host} (rank {one.rank}), which gives {one.address}"
        if one.named
        else f"on the node of rank {one.rank} its host name, {one.host}, resolves to {one.address}"
    )
    return SetupError(
        f"{why}, a loopback address, and rank {other.rank} is on another machine: it would connect to itself",
        f"export GLOO_SOCKET_IFNAME, on each node its own interface ({through}); "
        f"or give {one.host} its real address in /etc/hosts",
    )


def misnumbered(ranks: Sequence[RankAddress]) -> SetupError | None:
    """Returns the error if ranks are not numbered node by node, so that a node's first rank is not found; else None."""
    by_rank = {each.rank: each for each in ranks}
    for each in ranks:
        if each.local_rank == each.rank:  # also where no launcher said the local rank
            continue
        first = by_rank.get(each.rank - each.local_rank)
        if first is None or first.machine != each.machine or first.local_rank != 0:
            return SetupError(
                f"rank {each.rank} has local rank {each.local_rank} on {each.host}, so rank "
                f"{each.rank - each.local_rank} should be the first rank of that node, and it is not",
                "number the ranks node by node: mpirun --map-by slot, srun --distribution=block",
            )
    return None


def shared_gpu(ranks: Sequence[RankAddress]) -> str:
    """Returns a sentence that names two ranks with the same GPU; "" if there are none."""
    first: dict[tuple[str, str], RankAddress] = {}
    for each in ranks:
        other = first.setdefault((each.machine, each.gpu), each)
        if each.gpu and other is not each:
            return f"ranks {other.rank} and {each.rank} on {each.host} would share one GPU, {each.gpu}"
    return ""


def check_addresses(store: Store, mine: RankAddress, world_size: int, seconds: float) -> str:
    """Compares the ranks before gloo connects them. Every rank calls it and gets the same result.

    The store of torchrun's agent keeps keys of earlier attempts, so rank 0 accepts an answer only if it repeats the
    nonce of this attempt.

    Returns:
        A sentence if ranks would share a GPU; else "".

    Raises:
        SetupError: a rank would connect to itself, ranks are not numbered node by node, or ranks are missing after
            `seconds`.
    """
    if mine.rank != 0:
        token = uuid.uuid4().hex
        store.set(f"preflight/{mine.rank}", json.dumps({"token": token, **asdict(mine)}))
        nonce = _await(store, f"preflight/{token}", seconds)
        store.set(f"preflight/{nonce}/{token}", "here")
        verdict = json.loads(_await(store, f"preflight/{nonce}", seconds))
        if isinstance(verdict, str):
            return verdict
        raise SetupError(*verdict)
    nonce = uuid.uuid4().hex
    ranks = [mine, *_gathered(store, nonce, world_size, seconds)]
    error, shared = unreachable(ranks) or misnumbered(ranks), shared_gpu(ranks)
    store.set(f"preflight/{nonce}", json.dumps(shared if error is None else [error.message, error.hint]))
    if error is not None:
        raise error
    return shared


def _gathered(store: Store, nonce: str, world_size: int, seconds: float) -> list[RankAddress]:
    found: dict[int, RankAddress] = {}
    greeted: set[str] = set()
    missing: list[int] = []
    for _ in attempts(seconds):
        missing = [rank for rank in range(1, world_size) if rank not in found]
        for rank in missing:
            if not store.check([f"preflight/{rank}"]):
                continue
            said: dict[str, Any] = json.loads(store.get(f"preflight/{rank}"))
            token = said.pop("token")
            if store.check([f"preflight/{nonce}/{token}"]):
                found[rank] = RankAddress(**said | {"others": tuple(said["others"])})
            elif token not in greeted:
                store.set(f"preflight/{token}", nonce)
                greeted.add(token)
        if len(found) == world_size - 1:
            return [found[rank] for rank in range(1, world_size)]
    raise SetupError(f"ranks {missing} did not connect within {seconds:g} s", "start all ranks at about the same time")


def _await(store: Store, key: str, seconds: float) -> str:
    for _ in attempts(seconds):
        if store.check([key]):
            return store.get(key).decode()
    raise SetupError(f"rank 0 did not answer within {seconds:g} s", "start all ranks at about the same time")
