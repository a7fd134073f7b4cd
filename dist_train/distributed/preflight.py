"""Before ranks meet: what would keep them from it is an error that names the setting, not a timeout. Standard library only.

What gloo does was seen with torch 2.14 on two network namespaces: it listens at the address that the host name resolves to. Where
that is a loopback address on two machines, each connects to itself and is refused, and the others wait until the timeout. Of two
ranks the one with the higher address connects to the other (gloo's tcp/pair.cc), so a single machine with a loopback address does
no harm where all others have lower ones.
"""

from __future__ import annotations

import ipaddress
import json
import os
import platform
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from dist_train.cluster.interfaces import Interface, gloo_address, interfaces, is_loopback, named_interfaces, resolve
from dist_train.cluster.rank_plan import RankPlan
from dist_train.errors import Problem, SetupError

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NAME_SECONDS = 10.0  # a name that is not known yet: in a cluster that makes it when rank 0's container is up
_SAY_SECONDS = 10.0
_CONNECT_SECONDS = 120.0  # rank 0 may start late
_LOOPBACK_SECONDS = 30.0  # on several nodes a loopback address is nearly always wrong
_POLL_SECONDS = 0.2


class Store(Protocol):
    """What is used of torch's Store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


# What one rank can see alone.


def interface_problems(environ: Mapping[str, str], present: Sequence[Interface], cuda: bool) -> Iterator[Problem]:
    """Names in GLOO_SOCKET_IFNAME, and with `cuda` in NCCL_SOCKET_IFNAME, that are no interfaces of this machine, or such as are down."""
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
    """
    Raises:
        SetupError: a variable names an interface that ranks cannot use.
    """
    problem = next(interface_problems(environ, interfaces(), cuda), None)
    if problem is not None:
        raise SetupError(f"{problem.place} {problem.message}", problem.hint)


# Towards rank 0.


def hosts_store(plan: RankPlan, environ: Mapping[str, str]) -> bool:
    """Whether this process listens at MASTER_PORT, not another rank or torchrun's agent."""
    return plan.rank == 0 and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def find_rank_0(plan: RankPlan, environ: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Returns once MASTER_ADDR resolves and, where another process listens at MASTER_PORT, that one accepts a connection.

    Args:
        say: is given a sentence on what is waited for, if that takes long.

    Raises:
        SetupError: it does not come to that, which is no proof that it never would.
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
    start, said = time.monotonic(), False
    while True:
        why = _refusal(address, port)
        if why is None:
            return
        waited = time.monotonic() - start
        what = f"rank {plan.rank} does not reach rank 0 at MASTER_ADDR:MASTER_PORT, {address}:{port}: {why}"
        if waited > limit:
            raise SetupError(f"{what} for {waited:.0f} s", hint)
        if waited > _SAY_SECONDS and not said and (plan.local_rank == 0 or plan.rank == 1):
            said = True
            say(f"{what}; still trying for {limit - waited:.0f} s\n  -> {hint}")
        time.sleep(_POLL_SECONDS)


def _resolved(host: str) -> list[str]:
    end = time.monotonic() + _NAME_SECONDS
    while True:
        try:
            return resolve(host)
        except (OSError, UnicodeError) as error:  # UnicodeError: a label that is empty or too long
            if time.monotonic() > end:
                reason = getattr(error, "strerror", None) or str(error)
                raise SetupError(
                    f"MASTER_ADDR is {host!r}, which does not resolve to an address on this node: {reason}",
                    "give rank 0's IP address, or a name that every node knows (/etc/hosts, DNS)",
                ) from None
        time.sleep(_POLL_SECONDS)


def _refusal(address: str, port: int) -> str | None:
    """Why a connection fails, or None where one is accepted."""
    try:
        socket.create_connection((address, port), timeout=5.0).close()
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


# What only all ranks together can see.


@dataclass(frozen=True)
class Whereabouts:
    """Where a rank is.

    Attributes:
        machine: equal for ranks that reach each other by a loopback address.
        address: at which gloo would listen.
        named: GLOO_SOCKET_IFNAME.
        others: the interfaces that would do.
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
    """This start of this kernel, and the network namespace; where there is no /proc, the host's name."""
    try:
        return f"{_BOOT.read_text().strip()}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return platform.node()


def unreachable(ranks: Sequence[Whereabouts]) -> SetupError | None:
    """The error for ranks of which one would connect to itself, looking for another on another machine."""
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
        f"export GLOO_SOCKET_IFNAME, on each node its own interface ({through}); or give {one.host} its real address in /etc/hosts",
    )


def check_addresses(store: Store, mine: Whereabouts, world_size: int, seconds: float) -> None:
    """Compares where the ranks are, before gloo connects them. Every rank calls it, and all get the same answer.

    The store may hold keys of an earlier attempt (that of torchrun's agent does), so rank 0 counts an answer only if it repeats a
    nonce of this attempt.

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
    end, pause = time.monotonic() + seconds, 0.001
    while True:
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
        if time.monotonic() > end:
            raise SetupError(f"ranks {missing} did not come within {seconds:g} s", "start all ranks at about one time")
        time.sleep(pause)
        pause = min(pause * 2, _POLL_SECONDS)


def _await(store: Store, key: str, seconds: float) -> str:
    end, pause = time.monotonic() + seconds, 0.001
    while not store.check([key]):
        if time.monotonic() > end:
            raise SetupError(f"rank 0 did not answer within {seconds:g} s", "start all ranks at about one time")
        time.sleep(pause)
        pause = min(pause * 2, _POLL_SECONDS)
    return store.get(key).decode()
