"""Tests an all-reduce of two ranks on this machine with gloo, and its speed."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta

from dist_train.cluster.interfaces import interfaces
from dist_train.cluster.ports import first_free
from dist_train.distributed.preflight import interface_problems
from dist_train.doctor.base import Line, Subject, bad, good
from dist_train.errors import EXIT_CONFIG

_BYTES = 16 * 2**20
_ROUNDS = 10
_SECONDS = 40.0


def check(subject: Subject) -> Iterator[Line]:
    if any(problem.place == "GLOO_SOCKET_IFNAME" for problem in interface_problems(os.environ, interfaces(), False)):
        yield bad("two ranks cannot meet: GLOO_SOCKET_IFNAME (see network)", "unset GLOO_SOCKET_IFNAME", EXIT_CONFIG)
        return
    port = first_free(f"all-reduce {os.getpid()}")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "dist_train.doctor.all_reduce", str(rank), str(port)],
            env=_of_no_launcher(os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=_SECONDS) for rank in ranks]
    except subprocess.TimeoutExpired:
        yield bad(f"two ranks did not add within {_SECONDS:g} s", "a firewall on this machine? GLOO_SOCKET_IFNAME=lo")
        return
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank, (_, complaint) in zip(ranks, outputs, strict=True):
        if rank.returncode != 0:
            last = (complaint.strip().splitlines() or ["it said nothing"])[-1]
            yield bad(f"two ranks cannot add: {last}", "try GLOO_SOCKET_IFNAME=lo; see network")
            return
    seconds = json.loads(outputs[0][0])
    rate = _BYTES / statistics.median(seconds) / 1e6
    yield good(f"two ranks on gloo add {_BYTES // 2**20} MiB at {rate:.0f} MB/s (median of {_ROUNDS})")


def _of_no_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """Removes the variables by which torch would look for the store of a torchrun agent."""
    return {name: value for name, value in environ.items() if not name.startswith("TORCHELASTIC_")}


def _rank(rank: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=_SECONDS / 2))
    values = torch.full((_BYTES // 4,), float(rank + 1))
    dist.all_reduce(values)
    assert bool((values == 3).all()), "the sum is wrong"
    seconds = []
    for _ in range(_ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - start)
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), int(sys.argv[2]))
