"""Logs the loop's steps: loss, speed, data wait, gradient norm."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from dist_train.console.progress import Progress
from dist_train.trackers.base import Trackers
from dist_train.training.reduction import HostCopy, PendingMeans, StepMeans

T = TypeVar("T")


class DataClock:
    """Measures how long the loop waits for its batches, by the host's clock, without synchronising the device."""

    def __init__(self) -> None:
        self._waited = self._worked = 0.0
        self._arrived: float | None = None

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yields `batches` unchanged. The time from a batch's arrival to the request of the next one counts as work."""
        iterator = iter(batches)
        while True:
            asked = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._arrived = time.monotonic()
            self._waited += self._arrived - asked
            yield batch
            self._settle(time.monotonic())
            self._arrived = None

    def share(self) -> float:
        """Returns the share of the time since the last call spent waiting, 0 to 1, without evaluations."""
        self._settle(time.monotonic())
        total = self._waited + self._worked
        share = self._waited / total if total > 0 else 0.0
        self._waited = self._worked = 0.0
        return share

    def _settle(self, now: float) -> None:
        if self._arrived is not None:
            self._worked += now - self._arrived
            self._arrived = now


@dataclass
class _Step:
    pending: PendingMeans
    step: int
    epoch: int
    lr: float
    samples: int
    norm: HostCopy | None = None


class StepLog:
    """Reads the steps' reduced values and logs them.

    On a CPU they are read at once. On CUDA they are read a step later, because waiting for them would idle the device.
    Call `drain` before evaluating or saving.

    Args:
        log_every: steps between lines of metrics.
        lag: number of steps that may stay unread: 0 on a CPU, 1 on CUDA.
    """

    def __init__(
        self, stage: str, total_steps: int, log_every: int, progress: Progress, trackers: Trackers, lag: int
    ) -> None:
        self._stage, self._total_steps, self._log_every = stage, total_steps, log_every
        self._progress, self._trackers = progress, trackers
        self._lag = lag
        self._waiting: deque[_Step] = deque()
        self._read: deque[tuple[_Step, StepMeans]] = deque()
        self._data_wait = 0.0
        self._left_out = 0
        self.clock = DataClock()
        self.stop_agreed = False
        """True once any rank was asked to stop; equal on all ranks, because they have read the same steps."""

    def logs(self, step: int) -> bool:
        """Tells whether this step gets a line of metrics."""
        return step % self._log_every == 0 or step + 1 == self._total_steps

    def add(self, pending: PendingMeans, step: int, epoch: int, lr: float, samples: int) -> None:
        """Adds a step after its backward, before its update.

        Raises:
            NonFiniteLossError: on all ranks, if a loss that is read is not finite; on a CPU before the step's update.
        """
        self._waiting.append(_Step(pending, step, epoch, lr, samples))
        self._read_all_but(self._lag)

    def updated(self, grad_norm: torch.Tensor | None) -> None:
        """Adds the gradient norm of the newest step, float32 [] on the device, before clipping; then logs."""
        newest = self._waiting[-1] if self._waiting else self._read[-1][0]
        if grad_norm is not None and self.logs(newest.step):
            newest.norm = HostCopy(grad_norm)
        self._log()

    def drain(self) -> int:
        """Reads and logs all steps; returns the number of samples left out since the last call."""
        self._read_all_but(0)
        self._log()
        left_out, self._left_out = self._left_out, 0
        return left_out

    def _read_all_but(self, lag: int) -> None:
        while len(self._waiting) > lag:
            found = self._waiting.popleft()
            means = found.pending.means()
            self._read.append((found, means))
            self._left_out += found.samples - means.count
            self.stop_agreed |= means.stop
            if self.logs(found.step):
                self._data_wait = self.clock.share()
            self._progress.step(found.step + 1, means.count, means.loss, means.score, found.lr, self._data_wait)

    def _log(self) -> None:
        while self._read:
            found, means = self._read.popleft()
            if not self.logs(found.step):
                continue
            scalars = {
                "loss": means.loss,
                "score": means.score,
                "lr": found.lr,
                "samples_per_second": round(self._progress.samples_per_second, 1),
                "data_wait": round(self._data_wait, 4),
            }
            if found.norm is not None:
                scalars["grad_norm"] = float(found.norm.wait())
            self._trackers.log(self._stage, found.epoch, found.step, scalars)
