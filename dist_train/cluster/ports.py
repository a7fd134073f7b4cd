"""Ports for ranks to meet at: derived from a job's number, and outside the ephemeral range.

`python -m dist_train.cluster.ports KEY` prints the first free port of KEY: the batch script runs it on the node that
will listen.
"""

from __future__ import annotations

import socket
import sys
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from dist_train.errors import DistTrainError, SetupError

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_DEFAULT_EPHEMERAL = (32768, 60999)  # Linux, Documentation/networking/ip-sysctl.rst
_LOWEST, _PRIVILEGED, _HIGHEST = 10000, 1024, 65535  # below 10000 are most of the well-known services
_TRIES = 64


def ephemeral_range() -> tuple[int, int]:
    """Returns the first and last port that this system gives to outgoing connections: any of them may be taken."""
    try:
        first, last = _EPHEMERAL.read_text().split()
    except OSError:  # not Linux
        return _DEFAULT_EPHEMERAL
    return int(first), int(last)


def candidates(key: str, ephemeral: tuple[int, int]) -> Iterator[int]:
    """Yields all ports outside `ephemeral`, from one that `key` (a job's number) determines: the same for all ranks.

    Raises:
        SetupError: no port is outside.
    """
    first, last = ephemeral
    pool = [port for port in range(_LOWEST, _HIGHEST + 1) if not first <= port <= last]
    pool = pool or [port for port in range(_PRIVILEGED, _LOWEST) if not first <= port <= last]
    if not pool:
        raise SetupError(
            f"every port from {_PRIVILEGED} to {_HIGHEST} is in the ephemeral range, {first} to {last}",
            "sysctl net.ipv4.ip_local_port_range='32768 60999'",
        )
    start = zlib.crc32(key.encode()) % len(pool)
    yield from pool[start:] + pool[:start]


def is_free(port: int) -> bool:
    """Tells whether this process could listen at `port` on every IPv4 address of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def first_free(key: str, ephemeral: tuple[int, int] | None = None) -> int:
    """Returns the first of `key`'s ports that is free on this machine.

    Raises:
        SetupError: none of the first 64 is free.
    """
    tried = list(islice(candidates(key, ephemeral or ephemeral_range()), _TRIES))
    for port in tried:
        if is_free(port):
            return port
    raise SetupError(
        f"all of {len(tried)} ports from {tried[0]} on are taken on this node",
        "look with `ss -tlnp`, or choose one: MASTER_PORT for ranks started by srun, --port for dist-train launch",
    )


if __name__ == "__main__":
    try:
        print(first_free(sys.argv[1]))
    except DistTrainError as error:
        print(f"dist-train: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
