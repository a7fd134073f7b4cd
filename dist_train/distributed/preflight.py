"""Checks what would keep ranks from meeting, so that an error names the setting instead of a timeout. No torch.

Seen with torch 2.14 on two network namespaces: gloo listens at the address that the host name resolves to. Where that
is a loopback address on two machines, each connects to itself and is refused, and the others wait until the timeout.
Of two ranks the one with the higher address connects to the other (gloo's tcp/pair.cc). A single machine with a
loopback address therefore does no harm where all others have lower addresses.
"""

from __future__ import annotations

import ipaddress
import json
import os
import platform
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from dist_train.cluster.interfaces import Interface, gloo_address, interfaces, is_loopback, named_interfaces, resolve
from dist_train.cluster.rank_plan import RankPlan
from dist_train.distributed.polling import attempts
from dist_train.errors import Problem, SetupError

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAME_SECONDS = 10.0  # some clusters make the name only when rank 0's container is up
_SAY_SECONDS = 10.0
_CONNECT_SECONDS = 120.0  # rank 0 may start late
_LOOPBACK_SECONDS = 30.0  # on several nodes a loopback address is nearly always wrong


class Store(Protocol):
    """The part of torch's Store that is used."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


# Checks of one rank alone.


def interface_problems(environ: Mapping[str, str], present: Sequence[Interface], cuda: bool) -> Iterator[Problem]:
    """Finds names in GLOO_SOCKET_IFNAME, and with `cuda` in NCCL_SOCKET_IFNAME, that are no usable interface here."""
    by_name = {each.name: each for each in present}
    usable = [each.name for each in present if each.reaches_others] or [each.name for each in present if each.up]
    some = f" or {usable[0]}" if usable else ""
    for name in named_interfaces(environ):
        value = environ["GLOO_SOCKET_IFNAME"]
        hint = f"export GLOO_SOCKET_IFNAME={usable[0]}, or unset it" if usable else "unset GLOO_SOCKET_IFNAME"
        if name not in by_name:
            what = f"is {value!r}, but this machine has no interface {name!r}; it has {', '.join(by_name)}"
            yield Problem("GLOO_SOCKET_IFNAME", what, "environment", hint)
        elif not by_name[name].up:
            what = f"is {value!r}, but the interface {name} is down"
            yield Problem("GLOO_SOCKET_IFNAME", what, "environment", f"ip link set {name} up{some and f'; {hint}'}")
        elif not by_name[name].addresses and any(each.addresses for each in present):
            what = f"is {value!r}, but the interface {name} has no address"
            yield Problem("GLOO_SOCKET_IFNAME", what, "environment", hint)
    value = environ.get("NCCL_SOCKET_IFNAME", "")
    if cuda and value and not value.startswith("^"):  # ^ names those to leave out
        exact, names = value.startswith("="), value.removeprefix("=").split(",")
        matching = [
            each.name
            for each in present
            if each.up and any(each.name == name if exact else each.name.startswith(name) for name in names)
        ]
        if not matching:
            what = f"is {value!r}, but no interface of this machine that is up matches; it has {', '.join(by_name)}"
            yield Problem("NCCL_SOCKET_IFNAME", what, "environment", f"unset NCCL_SOCKET_IFNAME, or name another{some}")


def check_interfaces(environ: Mapping[str, str], cuda: bool) -> None:
    """Refuses a variable that names an interface that ranks cannot use.

    Raises:
        SetupError: with the first problem.
    """
    problem = next(interface_problems(environ, interfaces(), cuda), None)
    if problem is not None:
        raise SetupError(f"{problem.place} {problem.message}", problem.hint)


# Towards rank 0.


def hosts_store(plan: RankPlan, environ: Mapping[str, str]) -> bool:
    """Tells whether this process listens at MASTER_PORT, rather than another rank or torchrun's agent."""
    return plan.rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def find_rank_0(plan: RankPlan, environ: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Waits until MASTER_ADDR resolves and a process that listens at MASTER_PORT accepts a connection.

    Args:
        say: takes a sentence on the cause of a long wait.

    Raises:
        SetupError: it did not come to that in time.
    """
    address, port = plan.master_addr, plan.master_port
    addresses = _resolved(address)
    if hosts_store(plan, environ):
        return
    several = plan.world_size > plan.local_world_size
    astray = several and all(is_loopback(each) for each in addresses)
    limit = _LOOPBACK_SECONDS if astray else _CONNECT_SECONDS
    hint = (
        "MASTER_ADDR is a loopback address, at which each node reaches only itself: give that of rank 0's node"
        if astray
        else f"is rank 0 started? does MASTER_ADDR name its node? does a firewall close {port}? on rank 0's node: ss -tln"
    )
    said, what, waited = False, "", 0.0
    for waited in attempts(limit):
        why = _refusal(address, port)
        if why is None:
            return
        what = f"rank {plan.rank} does not reach rank 0 at MASTER_ADDR:MASTER_PORT, {address}:{port}: {why}"
        if waited > _SAY_SECONDS and not said and (plan.local_rank == 0 or plan.rank == 1):
            said = True
            say(f"{what}; still trying for {limit - waited:.0f} s\n  -> {hint}")
    raise SetupError(f"{what} for {waited:.0f} s", hint)


def _resolved(host: str) -> list[str]:
    reason = ""
    for _ in attempts(_NAME_SECONDS):
        try:
            return resolve(host)
        except (OSError, UnicodeError) as error:  # UnicodeError: a label that is empty or too long
            reason = getattr(error, "strerror", None) or str(error)
    raise SetupError(
        f"MASTER_ADDR is {host!r}, which does not resolve to an address on this node: {reason}",
        "give rank 0's IP address, or a name that every node knows (/etc/hosts, DNS)",
    )


def _refusal(address: str, port: int) -> str | None:
    """Returns why a connection fails, or None where one is accepted."""
    try:
        socket.create_connection((address, port), timeout=5.0).close()
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


# Checks of all ranks together.


@dataclass(frozen=True)
class Whereabouts:
    """The place of a rank in the network.

    Attributes:
        machine: equal for ranks that reach each other by a loopback address.
        address: at which gloo would listen.
        named: GLOO_SOCKET_IFNAME.
        others: the interfaces that would serve.
    """

    rank: int
    host: str
    machine: str
    address: str
    named: str = ""
    others: tuple[str, ...] = ()


def whereabouts(plan: RankPlan, environ: Mapping[str, str]) -> Whereabouts:
    present = interfaces()
    return Whereabouts(
        plan.rank,
        socket.gethostname(),
        _machine(),
        gloo_address(environ, present),
        environ.get("GLOO_SOCKET_IFNAME", ""),
        tuple(each.name for each in present if each.reaches_others),
    )


def _machine() -> str:
    """Identifies this start of this kernel and the network namespace; without /proc, the host's name."""
    try:
        return f"{_BOOT.read_text().strip()}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return platform.node()


def unreachable(ranks: Sequence[Whereabouts]) -> SetupError | None:
    """Returns the error for ranks of which one would connect to itself instead of another machine."""
    by_machine: dict[str, Whereabouts] = {}
    for each in ranks:
        if each.address:
            by_machine.setdefault(each.machine, each)
    for one in by_machine.values():
        for other in by_machine.values():
            if one.machine != other.machine and is_loopback(one.address) and not _lower(other.address, one.address):
                return _told_to_itself(one, other)
    return None


def _lower(first: str, second: str) -> bool:
    pair = ipaddress.ip_address(first.partition("%")[0]), ipaddress.ip_address(second.partition("%")[0])
    return pair[0].version == pair[1].version and pair[0].packed < pair[1].packed


def _told_to_itself(one: Whereabouts, other: Whereabouts) -> SetupError:
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


def check_addresses(store: Store, mine: Whereabouts, world_size: int, seconds: float) -> None:
    """Compares the places of the ranks before gloo connects them. Every rank calls it, and all get the same answer.

    The store of torchrun's agent holds keys of earlier attempts, so rank 0 counts an answer only if it repeats a nonce of
    this attempt.

    Raises:
        SetupError: a rank would connect to itself; or ranks do not come within `seconds`.
    """
    if mine.rank != 0:
        token = uuid.uuid4().hex
        store.set(f"preflight/{mine.rank}", json.dumps({"token": token, **asdict(mine)}))
        nonce = _await(store, f"preflight/{token}", seconds)
        store.set(f"preflight/{nonce}/{token}", "here")
        verdict = json.loads(_await(store, f"preflight/{nonce}", seconds))
        if verdict is not None:
            raise SetupError(*verdict)
        return
    nonce = uuid.uuid4().hex
    error = unreachable([mine, *_gathered(store, nonce, world_size, seconds)])
    store.set(f"preflight/{nonce}", json.dumps(None if error is None else [error.message, error.hint]))
    if error is not None:
        raise error


def _gathered(store: Store, nonce: str, world_size: int, seconds: float) -> list[Whereabouts]:
    found: dict[int, Whereabouts] = {}
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
                found[rank] = Whereabouts(**said | {"others": tuple(said["others"])})
            elif token not in greeted:
                store.set(f"preflight/{token}", nonce)
                greeted.add(token)
        if len(found) == world_size - 1:
            return [found[rank] for rank in range(1, world_size)]
    raise SetupError(f"ranks {missing} did not come within {seconds:g} s", "start all ranks at about one time")


def _await(store: Store, key: str, seconds: float) -> str:
    for _ in attempts(seconds):
        if store.check([key]):
            return store.get(key).decode()
    raise SetupError(f"rank 0 did not answer within {seconds:g} s", "start all ranks at about one time")
