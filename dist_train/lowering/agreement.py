"""Agreement of a runtime with the model in memory, measured on many rows: few rows show only gross errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dist_train import trees
from dist_train.distributed.world import World
from dist_train.programs.program import Call
from dist_train.tasks import Task
from dist_train.tasks.agreement import same_share
from dist_train.trees import Tree


@dataclass(frozen=True)
class Agreement:
    """Agreement of two models' decisions.

    Attributes:
        share: of the samples with the same decision; NaN where one model's outputs are not finite.
        samples: number of samples.
        bound: the smallest share that passes.
    """

    share: float
    samples: int
    bound: float

    @property
    def passed(self) -> bool:
        """True where the share reaches the bound; NaN does not."""
        return self.share >= self.bound

    def in_words(self) -> str:
        """`it decides the same on 54.1 % of 61 samples, and convert.agreement_bound is 0.99`."""
        return (
            f"it decides the same on {math.floor(self.share * 1000) / 10:g} % of {self.samples:,} samples"
            if math.isfinite(self.share)
            else f"some of its answers to {self.samples:,} samples are not finite"
        ) + f", and convert.agreement_bound is {self.bound:g}"


class Decisions:
    """The decisions of a model in memory on rows of the evaluation set, computed once, when first needed."""

    def __init__(self, call: Call, task: Task, batches: Iterable[Tree], bound: float) -> None:
        """
        Args:
            call: the model in memory, on the CPU.
            batches: inputs [B, ...]; iterated once per model, with equal rows each time.
            bound: the smallest share of equal decisions that passes.
        """
        self._call, self._task, self._batches, self._bound = call, task, batches, bound

    @cached_property
    def _expected(self) -> tuple[Tensor, bool]:
        return self._decide(self._call)

    @torch.no_grad()
    def _decide(self, call: Call) -> tuple[Tensor, bool]:
        """Returns the decisions, [samples, ...], and whether all outputs are finite."""
        decisions, finite = [], True
        for batch in self._batches:
            outputs = trees.map_leaves(lambda leaf: leaf.float() if leaf.is_floating_point() else leaf, call(batch))
            finite &= all(bool(torch.isfinite(leaf).all()) for leaf in trees.leaves(outputs))
            decisions.append(self._task.decide(self._task.pick(outputs)))
        return torch.cat(decisions), finite

    def agreement(self, call: Call) -> Agreement:
        """Measures how often `call`, the model in another runtime, decides as the model in memory does. On one rank."""
        (expected, right), (decisions, finite) = self._expected, self._decide(call)
        share = same_share(self._task, decisions, expected, World()) if right and finite else math.nan
        return Agreement(share, len(expected), self._bound)
