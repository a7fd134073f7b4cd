"""Defines the loop's hooks: small classes that the loop calls before each step."""

from __future__ import annotations

from typing import Protocol

from dist_train.config.fit import steps_in
from dist_train.config.stages import QATConfig
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from dist_train.training.reduction import StepReduction


class Hook(Protocol):
    """A callback of the loop.

    It must depend on the step number only, not on earlier calls, so that a resumed run equals an uninterrupted one.
    """

    def before_step(self, step: int) -> None:
        """Runs before the forward of `step`, counted from 0 within the stage."""


class FreezeSchedule:
    """Freezes BatchNorm's statistics, then the ranges, at fractions of the stage's steps.

    Moving statistics and ranges act as noise on the last, small steps (Jacob et al. 2018, arXiv:1712.05877, section 3;
    Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2). Weight scales are never frozen.
    """

    def __init__(
        self, config: QATConfig, total_steps: int, prepared: PreparedModel, ranges: Ranges, reduction: StepReduction
    ) -> None:
        self._batch_norm_step = steps_in(config.freeze_batch_norm, total_steps)
        self._ranges_step = steps_in(config.freeze_ranges, total_steps)
        self._prepared = prepared
        self._ranges = ranges
        self._reduction = reduction
        self._batch_norm_frozen = self._ranges_frozen = False

    def before_step(self, step: int) -> None:
        if step >= self._batch_norm_step and not self._batch_norm_frozen:
            self._batch_norm_frozen = True
            self._prepared.freeze_batch_norm()
            self._reduction.freeze_statistics()
        if step >= self._ranges_step and not self._ranges_frozen:
            self._ranges_frozen = True
            self._ranges.freeze()
            self._reduction.freeze_ranges()
