"""Which evaluation was the best, and whether it is time to stop: functions of the evaluations so far, and so exact across kills."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from dist_train.config.stages import FitConfig

INT8 = "int8_"  # before the name of a metric of the converted model


class Selection:
    """Ranks the evaluations of a stage by one metric. An evaluation whose metric is NaN is never the best, and no improvement.

    Attributes:
        metric: the one that `select_by` names, else the task's headline.
        history: (step, value) of each evaluation, in order; all that a resumed loop needs.
    """

    def __init__(self, config: FitConfig, headline: str, lower_is_better: Collection[str]) -> None:
        self.metric = config.select_by or headline
        self.history: list[tuple[int, float]] = []
        self._sign = -1.0 if self.metric.removeprefix(INT8) in lower_is_better else 1.0
        self._stopping = config.early_stopping

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Notes the evaluation after `step` optimizer steps."""
        self.history.append((step, float(metrics[self.metric])))

    def restore(self, history: Sequence[Sequence[float]]) -> None:
        self.history = [(int(step), float(value)) for step, value in history]

    @property
    def ranking(self) -> list[int]:
        """Steps of the evaluations, the best first; of equal ones the earliest is the better."""
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
        """Evaluations since the last one that improved by `min_delta` or more."""
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
        """Whether early stopping is asked for and its patience is at an end."""
        return self._stopping is not None and self.stale >= self._stopping.patience
