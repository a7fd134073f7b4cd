"""Ranks evaluations and decides on early stopping, from the evaluation history alone, so that resuming is exact."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from dist_train.config.fit import FitConfig

INT8 = "int8_"  # prefix of the converted model's metrics


class Selection:
    """Ranks the evaluations of a stage by one metric. A NaN is never the best and never an improvement.

    Attributes:
        metric: the metric that `select_by` names, else the task's headline metric.
        history: (step, value) of each evaluation, in order; all that a resumed loop needs.
    """

    def __init__(self, config: FitConfig, headline: str, lower_is_better: Collection[str]) -> None:
        self.metric = config.select_by or headline
        self.history: list[tuple[int, float]] = []
        self._lower = lower_is_better
        self._sign = -1.0 if self.lower_is_better(self.metric) else 1.0
        self._stopping = config.early_stopping

    def lower_is_better(self, metric: str) -> bool:
        """Tells whether a metric's smallest value is the best, also of the converted model's."""
        return metric.removeprefix(INT8) in self._lower

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the evaluation after `step` optimizer steps."""
        self.history.append((step, float(metrics[self.metric])))

    def restore(self, history: Sequence[Sequence[float]]) -> None:
        self.history = [(int(step), float(value)) for step, value in history]

    @property
    def ranking(self) -> list[int]:
        """Steps of the evaluations, best first; among equal values, earlier ones first."""
        ranked = sorted(
            (each for each in self.history if not math.isnan(each[1])), key=lambda each: -self._sign * each[1]
        )
        return [step for step, _ in ranked]

    @property
    def best_step(self) -> int | None:
        ranking = self.ranking
        return ranking[0] if ranking else None

    def value_at(self, step: int) -> float:
        return dict(self.history)[step]

    @property
    def stale(self) -> int:
        """Number of evaluations since the last improvement by at least `min_delta`."""
        least = 0.0 if self._stopping is None else self._stopping.min_delta
        reference, stale = -math.inf, 0
        for _, value in self.history:
            gain = self._sign * value - reference
            if gain > 0 and gain >= least:
                reference, stale = self._sign * value, 0
            else:
                stale += 1
        return stale

    @property
    def stop(self) -> bool:
        """True if early stopping is configured and its patience is exhausted."""
        return self._stopping is not None and self.stale >= self._stopping.patience
