"""Reduces loss, statistics and ranges over the ranks after each backward: at most two flat all-reduces (law 3)."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.distributed.world import World
from dist_train.errors import DataError, NonFiniteLossError, SetupError
from dist_train.models.batch_norm import running_statistics
from dist_train.quantization.ranges import Ranges


@dataclass(frozen=True)
class StepSums:
    """Sums over this rank's real samples of a step: `loss` and `score` are float32 tensors [] on the device.

    `global_count` samples were planned for all ranks; a sample that cannot be decoded is in no rank's `rows`.
    """

    loss: torch.Tensor
    score: torch.Tensor
    rows: int
    global_count: int


@dataclass(frozen=True)
class StepMeans:
    """Means over the real samples of all ranks, `count` of them."""

    loss: float
    score: float
    count: int
    stop: bool = False
    """Whether any rank was asked to stop."""


class HostCopy:
    """A small tensor on its way from the device to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor.detach().to("cpu", non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> torch.Tensor:
        """Waits for this copy alone, and returns it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class PendingMeans:
    """A reduction under way; on CUDA the loop asks for its `means()` a step later, so that the device never idles."""

    def __init__(
        self, totals: torch.Tensor, own_loss: torch.Tensor, global_count: int, step: int, world: World
    ) -> None:
        self._global_count = global_count
        self._step = step
        self._world = world
        self._own_loss = own_loss
        self._rows = totals[2]
        self._totals = HostCopy(totals)

    def means(self) -> StepMeans:
        """Waits for the means of the step.

        Raises:
            NonFiniteLossError: on every rank, if the loss of any is NaN or infinite; names the step and the ranks.
            DataError: on every rank, if no rank had a sample.
        """
        loss, score, count, stop = self._totals.wait().tolist()
        if not math.isfinite(loss):
            losses = self._world.gather(float(self._own_loss))
            ranks = [str(rank) for rank, own in enumerate(losses) if not math.isfinite(own)]
            place = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}" if ranks else "the sum over ranks"
            raise NonFiniteLossError(
                f"the loss of step {self._step} is not finite on {place}",
                "lower the learning rate, set clip_grad_norm, or look for bad samples: "
                "--debug.ledger true writes each step's ids",
            )
        if count == 0:
            raise DataError(
                f"none of the {self._global_count} samples of step {self._step} can be decoded",
                "look at the files and at the disk; --data.on_corrupt error names the first one",
            )
        return StepMeans(loss / count, score / count, int(count), stop > 0)

    def rescale(self, model: nn.Module) -> None:
        """Turns gradients of the sum over the planned count into those of the mean over the real one."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, self._global_count / self._rows)


def require_same_buffers(world: World, model: nn.Module) -> None:
    """Refuses models whose buffers follow each rank's own data: only one rank's buffers are saved. Collective.

    BatchNorm's running statistics are averaged and quantization ranges are merged, so those are equal.

    Raises:
        SetupError: on every rank; names the buffer.
    """
    if world.world_size == 1:
        return
    cumulative = [
        name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.momentum is None
    ]
    if cumulative:
        raise SetupError(
            f"{cumulative[0]} is a batch norm with momentum=None, whose average over batches differs by rank",
            "give it a momentum, such as 0.1, or train on one process",
        )
    kept = {name for name, _ in model.named_buffers()}
    digests = {
        name: hashlib.sha256(buffer.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, buffer in model.state_dict().items()
        if name in kept and buffer.dim() and not name.endswith("num_batches_tracked")
    }
    for other in world.gather(digests):
        different = [name for name in digests if other[name] != digests[name]]
        if different:
            raise SetupError(
                f"the buffer {different[0]} differs between ranks after a step: it follows each rank's own data",
                "compute it from synchronised values, or register it with persistent=False and keep nothing in it",
            )


class StepReduction:
    """Makes loss, BatchNorm statistics and quantization ranges those of all ranks' data.

    A SUM carries the loss, the score, the stop flag and the running statistics of BatchNorm, each rank's weighted by its
    share of the rows. Running statistics are linear in the batch's, so averaging them each step averages the batches'.
    A MAX carries the ranges. A rank without rows has weight 0: neither its statistics nor its ranges count.

    Args:
        model: the unwrapped module whose buffers named running_mean and running_var are averaged.
        ranges: of the prepared model; None in float training, which has no MAX.
        averaging: weight of a step's range in the moving average.
    """

    def __init__(self, world: World, model: nn.Module, ranges: Ranges | None = None, averaging: float = 1.0) -> None:
        self._world = world
        self._ranges = ranges
        self._averaging = averaging
        self._statistics = running_statistics(model)

    def freeze_statistics(self) -> None:
        """Leaves BatchNorm's statistics alone from now on; averaging equal values would still round them."""
        self._statistics = []

    def freeze_ranges(self) -> None:
        self._ranges = None

    @torch.no_grad()
    def __call__(self, sums: StepSums, step: int) -> PendingMeans:
        """Reduces one step; leaves the averaged statistics and ranges in the model."""
        rows, stop = (
            torch.full((), float(value), device=sums.loss.device) for value in (sums.rows, self._world.stop_wanted())
        )
        totals = torch.stack([sums.loss.float(), sums.score.float(), rows, stop])
        if self._world.world_size > 1:
            totals = self._sum(totals, sums)
        if self._ranges is not None:
            self._merge(self._ranges, sums.rows)
        return PendingMeans(totals, sums.loss, sums.global_count, step, self._world)

    def _sum(self, scalars: torch.Tensor, sums: StepSums) -> torch.Tensor:
        weight = sums.rows / sums.global_count
        # A rank without rows may have made infinities of its copies: 0 * inf must not reach the others.
        own = [
            buffer.float().flatten() * weight if sums.rows else torch.zeros_like(buffer, dtype=torch.float32).flatten()
            for buffer in self._statistics
        ]
        flat = self._world.all_reduce(torch.cat([scalars, *own]), "sum")
        if self._statistics:
            # The weights add up to 1 unless samples were left out, which this reduction alone tells. Times 1 is exact.
            averages = flat[len(scalars) :] * (sums.global_count / flat[2])
            pieces = averages.split([buffer.numel() for buffer in self._statistics])
            torch._foreach_copy_(
                self._statistics,
                [piece.view_as(buffer) for piece, buffer in zip(pieces, self._statistics, strict=True)],
            )
        return flat[: len(scalars)]

    def _merge(self, ranges: Ranges, rows: int) -> None:
        if rows == 0:
            ranges.drop()
        observed = ranges.observed()
        if self._world.world_size > 1:
            self._world.all_reduce(observed, "max")
        ranges.update(observed, self._averaging)
