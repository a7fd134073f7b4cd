"""Reduces loss, statistics and ranges over the ranks after each backward: at most two flat all-reduces (law 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from dist_train.distributed.world import World
from dist_train.errors import DataError, NonFiniteLossError
from dist_train.models.batch_norm import statistics_lookup
from dist_train.quantization.ranges import Ranges


@dataclass(frozen=True)
class StepSums:
    """Sums over this rank's real samples of a step.

    Attributes:
        loss, score: float32 tensors [] on the device.
        rows: number of this rank's samples that could be decoded.
        global_count: number of samples planned for all ranks.
    """

    loss: torch.Tensor
    score: torch.Tensor
    rows: int
    global_count: int


@dataclass(frozen=True)
class StepMeans:
    """Means over the `count` real samples of all ranks."""

    loss: float
    score: float
    count: int
    stop: bool = False
    """True if any rank was asked to stop."""


class HostCopy:
    """An asynchronous copy of a small tensor from the device to the host."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host = tensor.detach().to("cpu", non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> torch.Tensor:
        """Waits for this copy only, not for the whole device, and returns the tensor."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class PendingMeans:
    """A step's reduction, possibly still running.

    On CUDA the loop reads `means()` a step later, so that the device never idles.
    """

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
            NonFiniteLossError: on every rank, if any rank's loss is NaN or infinite; names the step and the ranks.
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
                "check the files and the disk; --data.on_corrupt error names the first bad file",
            )
        return StepMeans(loss / count, score / count, int(count), stop > 0)

    def rescale(self, model: nn.Module) -> None:
        """Rescales gradients from a mean over the planned count to one over the real count."""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, self._global_count / self._rows)


class StepReduction:
    """Reduces loss, BatchNorm statistics and quantization ranges over all ranks.

    A SUM carries the loss, the score, the stop flag and BatchNorm's running statistics, weighted by each rank's share
    of the rows. Running statistics are linear in the batch statistics, so averaging the former averages the latter.
    A MAX carries the ranges. A rank without rows has weight 0: its statistics and ranges are ignored.

    Args:
        model: the unwrapped module, whose buffers running_mean and running_var are averaged.
        ranges: ranges of the prepared model; None in float training, which needs no MAX.
        averaging: weight of a step's ranges in their moving average.
    """

    def __init__(self, world: World, model: nn.Module, ranges: Ranges | None = None, averaging: float = 1.0) -> None:
        self._world = world
        self._ranges = ranges
        self._averaging = averaging
        self._statistics = statistics_lookup(model)

    def freeze_statistics(self) -> None:
        """Stops averaging BatchNorm's statistics, which are frozen; averaging equal values would still round them."""
        self._statistics = list

    def freeze_ranges(self) -> None:
        """Stops merging the ranges, which are frozen."""
        self._ranges = None

    @torch.no_grad()
    def __call__(self, sums: StepSums, step: int) -> PendingMeans:
        """Reduces one step; writes the averaged statistics and merged ranges into the model. Collective."""
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
        weight, statistics = sums.rows / sums.global_count, self._statistics()
        # The copied rows of a rank without own rows may give infinite statistics; 0 * inf would give all ranks NaN.
        own = [
            buffer.float().flatten() * weight if sums.rows else torch.zeros_like(buffer, dtype=torch.float32).flatten()
            for buffer in statistics
        ]
        flat = self._world.all_reduce(torch.cat([scalars, *own]), "sum")
        if statistics:
            # The weights add up to 1, except if samples were left out; only this sum tells. Multiplying by 1 is exact.
            averages = flat[len(scalars) :] * (sums.global_count / flat[2])
            pieces = averages.split([buffer.numel() for buffer in statistics])
            torch._foreach_copy_(
                statistics,
                [piece.view_as(buffer) for piece, buffer in zip(pieces, statistics, strict=True)],
            )
        return flat[: len(scalars)]

    def _merge(self, ranges: Ranges, rows: int) -> None:
        if rows == 0:
            ranges.drop()
        observed = ranges.observed()
        if self._world.world_size > 1:
            self._world.all_reduce(observed, "max")
        ranges.update(observed, self._averaging)
