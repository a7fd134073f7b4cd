"""Statistics of an averaged model: its parameters are no step's own, so BatchNorm's moments and the ranges of the last step are not its."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from dist_train.data.arrays import Batch
from dist_train.distributed.world import World
from dist_train.models.batch_norm import batch_moments, running_statistics
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges

Autocast = Callable[[], AbstractContextManager[object]]


@torch.no_grad()
def estimate_moments(
    model: nn.Module, batches: Iterable[Batch], world: World, autocast: Autocast = nullcontext
) -> None:
    """Sets BatchNorm's running statistics to the mean of the batches' own, of all ranks, weighted by rows. Collective.

    As `torch.optim.swa_utils.update_bn`, which finds no batch norm in a prepared graph; on several thousand samples it is as good as on
    all (Wu and Johnson 2021, arXiv:2105.07576, section 3). Dropout is off, fake quantization stays as it is. Each batch meets the
    statistics that were there before, so that the sum does not depend on which rank has which batches, but for its rounding.
    Where no batch has two rows the statistics stay.

    Args:
        batches: this rank's; over all ranks each row once.
    """
    statistics = running_statistics(model)
    if not statistics:
        return
    before = [buffer.clone() for buffer in statistics]
    sums = torch.zeros(1 + sum(map(torch.numel, before)), dtype=torch.float64, device=world.device)
    with model.batch_moments() if isinstance(model, PreparedModel) else batch_moments(model):
        for batch in batches:
            world.heartbeat.enter("evaluate")
            if len(batch.ids) < 2:
                continue
            torch._foreach_copy_(statistics, before)
            with autocast():
                model(batch.inputs)
            own = torch.cat([torch.ones_like(sums[:1]), *(buffer.double().flatten() for buffer in statistics)])
            sums += len(batch.ids) * own
    world.all_reduce(sums, "sum")
    rows, totals = float(sums[0]), sums[1:].split([buffer.numel() for buffer in before])
    if rows > 0:
        before = [(total / rows).view_as(buffer) for total, buffer in zip(totals, before, strict=True)]
    torch._foreach_copy_(statistics, before)


@torch.no_grad()
def estimate_ranges(
    model: PreparedModel, batches: Iterable[Batch], world: World, autocast: Autocast = nullcontext
) -> None:
    """Sets every range to the smallest and largest value over the batches of all ranks, in evaluation mode. Collective.

    A MAX over samples: exactly the same at any world size.
    """
    ranges = Ranges(model)
    model.eval()
    ranges.drop()
    with model.observing(True):
        for batch in batches:
            world.heartbeat.enter("evaluate")
            with autocast():
                model(batch.inputs)
    ranges.update(world.all_reduce(ranges.observed(), "max"), averaging=1.0)
