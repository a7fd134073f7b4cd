"""Tests debug.collectives: ranks that call different collectives fail at once instead of waiting for the timeout."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from dist_train.config.tree import RunConfig
from dist_train.distributed.process_group import join
from dist_train.distributed.world import World
from dist_train.errors import DistTrainError
from tests.support.ranks import Ranks

GONE = 60.0
NEVER = 1000.0  # seconds; the world's timeout, so long that no test passes by waiting for it


def _operation(world: World) -> None:
    world.barrier("before")
    if world.rank == 1:
        dist.broadcast(torch.ones(3), src=0)
    else:
        dist.all_reduce(torch.ones(3))


def _shape(world: World) -> None:
    dist.all_reduce(torch.ones(3 + world.rank))


CASES: dict[str, Callable[[World], None]] = {"operation": _operation, "shape": _shape}


def case(name: str, timeout: float = NEVER) -> Ranks:
    return Ranks(2, ["-m", "tests.distributed.test_collectives_integration", name, str(timeout)])


def test_different_operations_end_both_ranks_with_torchs_own_comparison() -> None:
    with case("operation") as ranks:
        assert ranks.wait(GONE) == [1, 1], ranks.printed()
        for rank in (0, 1):
            printed = ranks.output(rank)
            assert "ALLREDUCE" in printed and "BROADCAST" in printed, printed


def test_different_shapes_are_named_too() -> None:
    with case("shape") as ranks:
        assert ranks.wait(GONE) == [1, 1], ranks.printed()
        assert "[3]" in ranks.output(0) and "[4]" in ranks.output(0), ranks.printed()


def _main(name: str, timeout: str) -> int:
    before = dist.get_debug_level()
    try:
        with join(RunConfig(device="cpu", timeout=float(timeout)), check_collectives=True) as world:
            assert dist.get_debug_level() == before, "only the groups made here are checked"
            CASES[name](world)
    except (RuntimeError, DistTrainError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
