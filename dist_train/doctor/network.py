"""Checks how ranks would find each other: interfaces, host name, ports."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dist_train.cluster.interfaces import gloo_address, interfaces, is_local, is_loopback, resolve
from dist_train.cluster.ports import ephemeral_range, first_free
from dist_train.distributed.preflight import interface_problems
from dist_train.doctor.base import Line, Subject, bad, good, warning
from dist_train.errors import EXIT_CONFIG, SetupError

_SLOW_SECONDS = 1.0


def check_interfaces(subject: Subject) -> Iterator[Line]:
    present = interfaces()
    told = [f"{each.name} {'up' if each.up else 'down'} {' '.join(each.addresses)}".rstrip() for each in present]
    yield good(f"interfaces: {', '.join(told)}")
    has_gpu = Path("/dev/nvidiactl").exists()
    problems = list(interface_problems(os.environ, present, cuda=True))
    for problem in problems:
        text = f"{problem.place} {problem.message}"
        matters = has_gpu or problem.place != "NCCL_SOCKET_IFNAME"
        yield bad(text, problem.hint, EXIT_CONFIG) if matters else warning(text, problem.hint)
    if not any(problem.place == "GLOO_SOCKET_IFNAME" for problem in problems):
        why = f"GLOO_SOCKET_IFNAME={os.environ['GLOO_SOCKET_IFNAME']}" if _chosen() else "GLOO_SOCKET_IFNAME is not set"
        yield good(f"gloo listens at {gloo_address(os.environ, present) or 'that interface'} ({why})")


def _chosen() -> bool:
    return bool(os.environ.get("GLOO_SOCKET_IFNAME"))


def check_host_name(subject: Subject) -> Iterator[Line]:
    name = socket.gethostname()
    usable = [each.name for each in interfaces() if each.reaches_others]
    hint = f"for several nodes: export GLOO_SOCKET_IFNAME={usable[0] if usable else 'INTERFACE'}"
    start = time.monotonic()
    try:
        addresses = resolve(name)
    except OSError as error:
        addresses = []
        text = f"the host name, {name}, does not resolve ({error.strerror}): gloo takes the loopback address"
        yield good(text) if _chosen() else warning(text, hint)
    seconds = time.monotonic() - start
    if seconds > _SLOW_SECONDS:
        yield warning(f"resolving it took {seconds:.1f} s", f"a line for {name} in /etc/hosts, or a nearer name server")
    if not addresses:
        return
    text = f"the host name, {name}, resolves to {', '.join(addresses)}"
    if not any(is_local(address) for address in addresses):
        text += ", which this machine does not have: gloo takes the loopback address"
    elif is_loopback(next(address for address in addresses if is_local(address))):
        text += ": right for ranks on one machine, not for several"
    else:
        yield good(text)
        return
    yield good(text) if _chosen() else warning(text, hint)


def check_ports(subject: Subject) -> Iterator[Line]:
    first, last = ephemeral_range()
    try:
        port = first_free(f"doctor {os.getpid()}")
    except SetupError as error:
        yield bad(error.message, error.hint)
        return
    yield good(f"ports: {port}, derived as for a job, is free; the ephemeral range, {first} to {last}, is avoided")
