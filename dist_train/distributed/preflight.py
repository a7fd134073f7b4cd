"""Checks network settings of one rank, so that an error names the wrong setting instead of a timeout.

Imports no torch.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence

from dist_train.cluster.interfaces import Interface, interfaces, is_loopback, named_interfaces, resolve
from dist_train.cluster.rank_plan import RankPlan
from dist_train.distributed.polling import attempts
from dist_train.errors import Problem, SetupError

_NAME_SECONDS = 10.0  # some clusters register the name only once rank 0's container is up
_SAY_SECONDS = 10.0
_CONNECT_SECONDS = 120.0  # rank 0 may start late
_LOOPBACK_SECONDS = 30.0  # shorter: with several nodes a loopback address is nearly always a mistake


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
