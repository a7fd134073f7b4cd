"""Does a runtime decide as the model in memory does: on many rows, as a few of a probe show only what is wrong everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dist_train.tasks import Task

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """`share` of `samples` on which two models decide the same, NaN where one answers what is not finite; and the least that passes."""

    share: float
    samples: int
    bound: float

    @property
    def passed(self) -> bool:
        return self.share >= self.bound

    def in_words(self) -> str:
        """`it decides the same on 54.1 % of 61 samples, and convert.agreement_bound is 0.99`."""
        return (
            f"it decides the same on {math.floor(self.share * 1000) / 10:g} % of {self.samples:,} samples"
            if math.isfinite(self.share)
            else f"some of its answers to {self.samples:,} samples are not finite"
        ) + f", and convert.agreement_bound is {self.bound:g}"


class Decisions:
    """What a model decides on rows of the evaluation set, for runtimes to be held against; it is asked once, when first needed."""

    def __init__(self, call: Call, task: Task, batches: Iterable[Tensor], bound: float) -> None:
        """call: the model in memory, on the CPU. batches: float32 [B, C, H, W], the same each time. bound: the least share that passes."""
        self._call, self._task, self._batches, self._bound = call, task, batches, bound

    @cached_property
    def _expected(self) -> tuple[Tensor, bool]:
        return self._decide(self._call)

    @torch.no_grad()
    def _decide(self, call: Call) -> tuple[Tensor, bool]:
        """Decisions, [samples, ...], and whether all answers are finite."""
        decisions, finite = [], True
        for batch in self._batches:
            answers = call(batch).float()
            finite &= bool(torch.isfinite(answers).all())
            decisions.append(self._task.decide(answers))
        return torch.cat(decisions), finite

    def agreement(self, call: Call) -> Agreement:
        """How often `call`, the model in another runtime, decides as the model in memory."""
        (expected, right), (decisions, finite) = self._expected, self._decide(call)
        share = same_share(self._task, decisions, expected) if right and finite else math.nan
        return Agreement(share, len(expected), self._bound)


def same_share(task: Task, ours: Tensor, theirs: Tensor) -> float:
    """As `evaluate.agreement`, of decisions [samples, ...] in hand."""
    if theirs.is_floating_point():
        spread = theirs.std(0, correction=0).clamp(min=torch.finfo(torch.float32).eps)
        ours, theirs = ours / spread, theirs / spread
    return float(task.agree(ours, theirs).mean())
