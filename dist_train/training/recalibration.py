"""Recomputes BatchNorm statistics and ranges of an averaged model.

Its parameters belong to no single step, so the last step's statistics and ranges do not fit it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from dist_train import trees
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
    """Sets BatchNorm's running statistics to the row-weighted mean of the batch statistics of all ranks. Collective.

    Replaces `torch.optim.swa_utils.update_bn`, which finds no batch norm modules in a prepared graph. Several thousand
    samples do as well as the whole set (Wu and Johnson 2021, arXiv:2105.07576, section 3).

    Dropout is off; fake quantization is left as it is. Every batch starts from the same statistics, so the result does
    not depend on which rank has which batch, up to rounding. If no batch has two rows, the statistics do not change.

    Args:
        batches: this rank's batches; over all ranks, each row occurs once.
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
                trees.call(model, batch.inputs)
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
    """Sets every range to the minimum and maximum over the batches of all ranks, in eval mode. Collective.

    The reduction is a MAX over samples, so the result is the same at any world size, bit for bit.
    """
    ranges = Ranges(model)
    model.eval()
    ranges.drop()
    with model.observing(True):
        for batch in batches:
            world.heartbeat.enter("evaluate")
            with autocast():
                trees.call(model, batch.inputs)
    ranges.update(world.all_reduce(ranges.observed(), "max"), averaging=1.0)
