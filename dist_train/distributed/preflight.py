"""Checks network settings before the ranks connect, so that an error names the wrong setting instead of a timeout.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from dist_train.cluster.interfaces import Interface, gloo_address, interfaces, is_loopback, named_interfaces, resolve
from dist_train.cluster.rank_plan import RankPlan
from dist_train.distributed.polling import attempts
from dist_train.errors import Problem, SetupError

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAME_SECONDS = 10.0  # some clusters register the name only once rank 0's container is up
_SAY_SECONDS = 10.0
_CONNECT_SECONDS = 120.0  # rank 0 may start late
_LOOPBACK_SECONDS = 30.0  # shorter: with several nodes a loopback address is nearly always a mistake


class Store(Protocol):
    """The methods of torch's Store that the preflight uses."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


# Checks that one rank makes alone.


def interface_problems(environ: Mapping[str, str], present: Sequence[Interface], cuda: bool) -> Iterator[Problem]:
    """Yields a problem for each name in GLOO_SOCKET_IFNAME that is not a usable interface of this machine.

    With `cuda`, checks NCCL_SOCKET_IFNAME too.
    """
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
    if cuda and value and not value.startswith("^"):  # a leading ^ excludes interfaces
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
    """Checks that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name usable interfaces.

    Raises:
        SetupError: they do not; the first problem is named.
    """
    problem = next(interface_problems(environ, interfaces(), cuda), None)
    if problem is not None:
        raise SetupError(f"{problem.place} {problem.message}", problem.hint)


# The connection to rank 0.


def hosts_store(plan: RankPlan, environ: Mapping[str, str]) -> bool:
    """Tells whether this process hosts the store at MASTER_PORT; otherwise another rank or torchrun's agent does."""
    return plan.rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def find_rank_0(plan: RankPlan, environ: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Waits until MASTER_ADDR resolves and a process that listens at MASTER_PORT accepts a connection.

    Args:
        say: prints a sentence about a long wait and its likely cause.

    Raises:
        SetupError: the name does not resolve, or no connection is accepted in time.
    """
    address, port = plan.master_addr, plan.master_port
    addresses = _resolved(address)
    if hosts_store(plan, environ):
        return
    several = plan.world_size > plan.local_world_size
    astray = several and all(is_loopback(each) for each in addresses)
    limit = _LOOPBACK_SECONDS if astray else _CONNECT_SECONDS
    hint = (
        "MASTER_ADDR is a loopback address, at which each node reaches only itself: give rank 0's address instead"
        if astray
        else f"is rank 0 started? is MASTER_ADDR its node? does a firewall close {port}? on rank 0's node: ss -tln"
    )
    said, what, waited = False, "", 0.0
    for waited in attempts(limit):
        why = _refusal(address, port)
        if why is None:
            return
        what = f"rank {plan.rank} cannot reach rank 0 at MASTER_ADDR:MASTER_PORT, {address}:{port}: {why}"
        if waited > _SAY_SECONDS and not said and (plan.local_rank == 0 or plan.rank == 1):
            said = True
            say(f"{what}; still trying for {limit - waited:.0f} s\n  -> {hint}")
    raise SetupError(f"{what} for {waited:.0f} s", hint)


def _resolved(host: str) -> list[str]:
    reason = ""
    for _ in attempts(_NAME_SECONDS):
        try:
            return resolve(host)
        except (OSError, UnicodeError) as error:  # UnicodeError: an empty or overlong label in the name
            reason = getattr(error, "strerror", None) or str(error)
    raise SetupError(
        f"MASTER_ADDR is {host!r}, which does not resolve to an address on this node: {reason}",
        "give rank 0's IP address, or a name that every node knows (/etc/hosts, DNS)",
    )


def _refusal(address: str, port: int) -> str | None:
    """Returns the reason why a connection fails; None if it is accepted."""
    try:
        socket.create_connection((address, port), timeout=5.0).close()
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


# Checks over all ranks.


@dataclass(frozen=True)
class RankAddress:
    """A rank's address in the network.

    Attributes:
        machine: identifies the machine; ranks with equal values reach each other by a loopback address.
        address: the address at which gloo would listen; "" if it cannot be determined.
        named: value of GLOO_SOCKET_IFNAME.
        others: names of the interfaces that reach other machines.
    """

    rank: int
    host: str
    machine: str
    address: str
    named: str = ""
    others: tuple[str, ...] = ()


def rank_address(plan: RankPlan, environ: Mapping[str, str]) -> RankAddress:
    """Returns this rank's address, as gloo will choose it."""
    present = interfaces()
    return RankAddress(
        plan.rank,
        socket.gethostname(),
        _machine(),
        gloo_address(environ, present),
        environ.get("GLOO_SOCKET_IFNAME", ""),
        tuple(each.name for each in present if each.reaches_others),
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


def check_addresses(store: Store, mine: RankAddress, world_size: int, seconds: float) -> None:
    """Compares the addresses of all ranks before gloo connects them. Every rank calls it and gets the same result.

    The store of torchrun's agent keeps keys of earlier attempts, so rank 0 accepts an answer only if it repeats the
    nonce of this attempt.

    Raises:
        SetupError: a rank would connect to itself, or ranks are missing after `seconds`.
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
