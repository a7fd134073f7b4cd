"""`debug.collectives`: ranks that call different collectives end with an error that names them, instead of hanging."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from dist_train.errors import CollectiveMismatchError

_TORCH = str(Path(torch.__file__).parent)
# What torch 2.14 writes in torch/csrc/distributed/c10d/ProcessGroupWrapper.cpp and ProcessGroupGloo.cpp.
_CALL = re.compile(
    r"[Rr]ank (\d+) is running collective: CollectiveFingerPrint\(SequenceNumber=\d+, OpType=(\w+)"
    r"(?:, TensorShape=\[([\d, ]*)\], TensorDtypes=(\w+))?"
)
_ABSENT = re.compile(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier in (\d+) ms")
_HINT = "look before these lines for a branch that only some ranks take, or for data of different shapes"


@contextmanager
def collectives_checked() -> Iterator[None]:
    """Process groups formed in this block compare operation, shape and dtype before each collective.

    This is torch's debug level DETAIL, which `TORCH_DISTRIBUTED_DEBUG` sets for a whole process. It does not see that ranks
    reduce differently, such as SUM here and MAX there.
    """
    before = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        yield
    finally:
        dist.set_debug_level(before)


def mismatch(error: BaseException) -> CollectiveMismatchError | None:
    """The error that stands for what a checked process group raised; None where `error` is something else."""
    if not isinstance(error, RuntimeError):
        return None
    calls, absent = _CALL.findall(str(error)), _ABSENT.search(str(error))
    if calls:
        said = ", ".join(
            f"rank {rank} {operation}" + (f" of {dtype} [{shape}]" if dtype else "")
            for rank, operation, shape, dtype in calls
        )
        return CollectiveMismatchError(
            f"the ranks called different collectives: {said}; rank {calls[0][0]} called it at {_place(error)}", _HINT
        )
    if absent:
        who, milliseconds = absent.groups()
        return CollectiveMismatchError(
            f"rank {who} did not come within {int(milliseconds) / 1000:g} s to the collective called at {_place(error)}",
            f"{_HINT}; where it is only slow, raise --run.timeout",
        )
    return None


def _place(error: BaseException) -> str:
    """File and line of the newest frame outside torch."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_TORCH)]
    return f"{frames[-1].filename}:{frames[-1].lineno}"
