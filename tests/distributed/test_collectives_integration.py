"""debug.collectives: ranks that call different collectives end at once, and each says who called what, and where."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from dist_train.collectives import mismatch
from dist_train.config.tree import RunConfig
from dist_train.distributed.process_group import join
from dist_train.distributed.world import World
from dist_train.errors import DistTrainError
from tests.support.ranks import Ranks

GONE = 60.0
NEVER = 1000.0  # timeout of the world: no test passes by waiting for it


def _operation(world: World) -> None:
    world.barrier("before")
    if world.rank == 1:
        dist.broadcast(torch.ones(3), src=0)
    else:
        dist.all_reduce(torch.ones(3))


def _shape(world: World) -> None:
    dist.all_reduce(torch.ones(3 + world.rank))


def _absent(world: World) -> None:
    if world.rank == 0:
        world.barrier("alone")
    else:
        threading.Event().wait()


CASES: dict[str, Callable[[World], None]] = {"operation": _operation, "shape": _shape, "absent": _absent}


def case(name: str, timeout: float = NEVER) -> Ranks:
    return Ranks(2, ["-m", "tests.distributed.test_collectives_integration", name, str(timeout)])


def line_of(function: Callable[[World], None], text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(number for number, line in enumerate(lines) if text in line)


def test_different_operations_end_both_ranks_at_once_with_who_called_what_and_where() -> None:
    with case("operation") as ranks:
        assert ranks.wait(GONE) == [1, 1], ranks.printed()
        calls = {0: "rank 0 ALLREDUCE of Float [3]", 1: "rank 1 BROADCAST of Float [3]"}
        places = {0: line_of(_operation, "all_reduce"), 1: line_of(_operation, "broadcast")}
        for rank in (0, 1):
            printed = ranks.output(rank)
            assert f"the ranks called different collectives: {calls[rank]}, {calls[1 - rank]}" in printed, printed
            assert f"rank {rank} called it at " in printed and f"{__file__}:{places[rank]}\n" in printed, printed
            assert "Traceback" not in printed, printed


def test_different_shapes_are_named_too() -> None:
    with case("shape") as ranks:
        assert ranks.wait(GONE) == [1, 1], ranks.printed()
        assert "rank 0 ALLREDUCE of Float [3], rank 1 ALLREDUCE of Float [4]" in ranks.output(0), ranks.printed()


def test_other_errors_are_left_as_they_are() -> None:
    assert (
        mismatch(ValueError("Rank 0 is running collective: CollectiveFingerPrint(SequenceNumber=1, OpType=X")) is None
    )
    assert mismatch(RuntimeError("Connection closed by peer")) is None


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named_after_the_timeout() -> None:
    with case("absent", 3.0) as ranks:
        assert ranks.until(lambda: ranks.processes[0].poll() is not None, GONE)
        assert "rank 1 did not come within 3 s to the collective called at " in ranks.output(0), ranks.printed()


def _main(name: str, timeout: str) -> int:
    before = dist.get_debug_level()
    try:
        with join(RunConfig(device="cpu", timeout=float(timeout)), check_collectives=True) as world:
            assert dist.get_debug_level() == before, "only the groups made here are checked"
            CASES[name](world)
    except DistTrainError as error:
        print(f"dist-train: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
