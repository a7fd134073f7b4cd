"""Reduces loss, statistics and ranges over the ranks as backward runs: a SUM with the gradients, and a MAX (law 3)."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from dist_train.distributed.world import Reducing, World
from dist_train.errors import DataError, NonFiniteLossError
from dist_train.models.batch_norm import statistics_lookup
from dist_train.quantization.ranges import Ranges
from dist_train.strategies.base import Strategy, Summed
from dist_train.strategies.shards import local


@dataclass(frozen=True)
class StepSums:
    """Sums over this rank's real samples of a step.

    Attributes:
        loss, score: float32 tensors [] on the device.
        rows: number of this rank's samples that could be decoded.
        global_count: number of samples planned for all ranks.
        count: what a task's summed losses are counted by, float32 [] on the device; None for a loss of each sample.
    """

    loss: torch.Tensor
    score: torch.Tensor
    rows: int
    global_count: int
    count: torch.Tensor | None = None


@dataclass(frozen=True)
class StepMeans:
    """Means over the `count` real samples of all ranks; of a loss that is counted otherwise, over its own count."""

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
        self._rows = totals[2].round()
        # What a summed loss is counted by may be no integer, as a sum of weights.
        self._count = self._rows if len(totals) == _SCALARS else totals[_SCALARS]
        self._totals = HostCopy(totals)

    def means(self) -> StepMeans:
        """Waits for the means of the step.

        Raises:
            NonFiniteLossError: on every rank, if any rank's loss is NaN or infinite; names the step and the ranks.
            DataError: on every rank, if no rank had a sample.
        """
        loss, score, count, stop, *counted = self._totals.wait().tolist()
        if not math.isfinite(loss):
            losses = self._world.gather(float(self._own_loss))
            ranks = [str(rank) for rank, own in enumerate(losses) if not math.isfinite(own)]
            place = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}" if ranks else "the sum over ranks"
            raise NonFiniteLossError(
                f"the loss of step {self._step} is not finite on {place}",
                "lower the learning rate, set clip_grad_norm, or look for bad samples: "
                "--debug.ledger true writes each step's ids",
            )
        if round(count) == 0:
            raise DataError(
                f"none of the {self._global_count} samples of step {self._step} can be decoded",
                "check the files and the disk; --data.on_corrupt error names the first bad file",
            )
        count = round(count)  # DDP's mean, times the number of ranks
        mean = loss / count if not counted else loss / counted[0] if counted[0] else 0.0
        return StepMeans(mean, score / count, count, stop > 0)

    def rescale(self, model: nn.Module) -> None:
        """Rescales gradients from a mean over the planned samples to one over the real ones, or the loss's own count.

        Where nothing was counted, they become 0.
        """
        gradients = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        factor = self._global_count / self._count
        torch._foreach_mul_(gradients, factor.masked_fill(self._count == 0, 0.0))


_SCALARS = 4  # loss, score, rows, stop


@dataclass(frozen=True)
class _Started:
    """A reduction between `begin` and `finish`; `summed` and `observed` are None with one rank."""

    sums: StepSums
    totals: torch.Tensor
    summed: Summed | None
    observed: Reducing | None
    stops_alone: bool = False


class StepReduction:
    """Reduces loss, BatchNorm statistics and quantization ranges over all ranks.

    A SUM carries the loss, the score, the stop flag and BatchNorm's running statistics, weighted by each rank's share
    of the rows. Running statistics are linear in the batch statistics, so averaging the former averages the latter.
    A MAX carries the ranges. A rank without rows has weight 0: its statistics and ranges are ignored.

    Attributes:
        counts_losses: True where the task's losses are counted otherwise than by samples; the count travels along.

    Args:
        model: the unwrapped module, whose buffers running_mean and running_var are averaged.
        ranges: ranges of the prepared model; None in float training, which needs no MAX.
        averaging: weight of a step's ranges in their moving average.
    """

    def __init__(self, world: World, model: nn.Module, ranges: Ranges | None = None, averaging: float = 1.0) -> None:
        self._world = world
        self._ranges = ranges
        self._averaging = averaging
        self._model = model
        self._statistics = statistics_lookup(model)
        self._frozen = False
        self._started: _Started | None = None
        self._counts: tuple[tuple[float, float], torch.Tensor] | None = None
        self.counts_losses = False

    def freeze_statistics(self) -> None:
        """Stops averaging BatchNorm's statistics, which are frozen; averaging equal values would still round them."""
        self._statistics, self._frozen = list, True

    def leave_out(self, batch_norms: Collection[str]) -> None:
        """Stops averaging the statistics of some modules, by name, which are frozen; those of others go on."""
        if not self._frozen:
            self._statistics = statistics_lookup(self._model, batch_norms)

    def freeze_ranges(self) -> None:
        """Stops merging the ranges, which are frozen."""
        self._ranges = None

    @property
    def size(self) -> int:
        """Number of values that are summed in a step."""
        return _SCALARS + self.counts_losses + sum(buffer.numel() for buffer in self._statistics())

    def begin(self, sums: StepSums, loss: torch.Tensor, strategy: Strategy) -> torch.Tensor:
        """Begins to reduce a step whose last forward is done, as backward runs. Collective.

        All of it is known after forward. The sum travels with the gradients, the maximum beside them.

        Returns:
            the loss to call backward with.
        """
        counts = float(sums.rows), float(self._world.stop_wanted())
        if self._counts is None or self._counts[0] != counts:  # hardly ever change
            self._counts = counts, torch.tensor(counts, device=sums.loss.device)
        totals = torch.cat([sums.loss.float().view(1), sums.score.float().view(1), self._counts[1]])
        if sums.count is not None:
            totals = torch.cat([totals, sums.count.float().view(1)])
        summed = observed = None
        if strategy.several:
            with torch.no_grad():
                flat = self._weighted(totals, sums)
                if self._ranges is not None:
                    observed = self._world.start_all_reduce(self._observed(self._ranges, sums.rows), "max")
            loss, summed = strategy.summed_in_backward(loss, flat)
        self._started = _Started(sums, totals, summed, observed, strategy.leaves_alone)
        return loss

    @torch.no_grad()
    def finish(self, step: int) -> PendingMeans:
        """Writes the averaged statistics and merged ranges into the model. Collective.

        Called after backward, which reads the old ones.
        """
        assert self._started is not None, "begin() comes first"
        started, self._started = self._started, None
        sums, totals = started.sums, started.totals
        if started.summed is not None:
            own, totals = totals[3], self._averaged(started.summed(), sums)
            if started.stops_alone:
                totals[3] = own
        if self._ranges is not None:
            # Replicas within a rank (DataParallel) are merged by backward, so a single rank's ranges are read after it.
            observed = self._observed(self._ranges, sums.rows) if started.observed is None else started.observed.wait()
            self._ranges.update(observed, self._averaging)
        return PendingMeans(totals, sums.loss, sums.global_count, step, self._world)

    def _weighted(self, scalars: torch.Tensor, sums: StepSums) -> torch.Tensor:
        """Returns scalars [4 or 5] and this rank's statistics, weighted by its share of the rows, in one tensor."""
        statistics = [buffer.float().flatten() for buffer in self._statistics()]
        flat = torch.cat([scalars, *statistics])
        if sums.rows:
            flat[len(scalars) :] *= sums.rows / sums.global_count
        else:
            # The copied rows of a rank without own rows may give infinite statistics; 0 * inf would give all ranks NaN.
            flat[len(scalars) :] = 0
        return flat

    def _averaged(self, flat: torch.Tensor, sums: StepSums) -> torch.Tensor:
        """Writes the statistics of all ranks into the model; returns the scalars' sums, float32 [4 or 5]."""
        statistics, scalars = self._statistics(), _SCALARS + (sums.count is not None)
        if statistics:
            # The weights add up to 1, except if samples were left out; only this sum tells. Multiplying by 1 is exact.
            averages = flat[scalars:] * (sums.global_count / flat[2].round())
            pieces = averages.split([buffer.numel() for buffer in statistics])
            torch._foreach_copy_(
                statistics,
                [piece.view_as(buffer) for piece, buffer in zip(pieces, statistics, strict=True)],
            )
        return flat[:scalars]

    def _observed(self, ranges: Ranges, rows: int) -> torch.Tensor:
        if rows == 0:
            ranges.drop()
        return ranges.observed()
