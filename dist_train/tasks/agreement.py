"""Agreement of two models: the share of samples for which their decisions are the same."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dist_train.tasks.base import Task


class Ranks(Protocol):
    """The part of `dist_train.distributed.world.World` that is needed here."""

    device: torch.device

    def gather(self, value: Any) -> list[Any]: ...

    def all_reduce(self, tensor: Tensor, operation: Literal["sum", "max"]) -> Tensor: ...


def same_share(task: Task, actual: Tensor, expected: Tensor, ranks: Ranks) -> float:
    """Computes the share of the samples of all ranks for which two models decide the same. Collective.

    Decisions that are floats are compared in units of the standard deviation of `expected` over all ranks' samples.

    actual, expected: decisions of this rank's samples, [samples, ...]; a rank may have none.
    """
    spread = _spread(expected, ranks)
    if spread is not None and len(expected):
        actual, expected = actual / spread, expected / spread
    same = torch.tensor(
        [float(task.agree(actual, expected).sum()) if len(expected) else 0.0, float(len(expected))],
        dtype=torch.float64,
        device=ranks.device,
    )
    ranks.all_reduce(same, "sum")
    return float(same[0] / same[1].clamp(min=1))


def _spread(decisions: Tensor, ranks: Ranks) -> Tensor | None:
    """Computes each output's standard deviation over all ranks, [...] on the CPU; None for integer decisions."""
    # A rank without samples does not know the shape of the others' decisions.
    shapes = ranks.gather(list(decisions.shape[1:]) if decisions.is_floating_point() and len(decisions) else None)
    shape = next((shape for shape in shapes if shape is not None), None)
    if shape is None:
        return None
    sums = torch.zeros(3, *shape, dtype=torch.float64, device=ranks.device)
    if len(decisions):
        values = decisions.double()
        sums[0], sums[1], sums[2] = values.sum(0), values.square().sum(0), len(values)
    total, squares, count = ranks.all_reduce(sums, "sum").cpu()
    deviation = (squares / count - (total / count) ** 2).clamp(min=0).sqrt()
    # Outputs that are all equal must be equal in the other model too, up to rounding.
    return deviation.clamp(min=torch.finfo(torch.float32).eps).float()
