"""Groups the scalars that a run logged into curves and charts.

The scalars' names decide, so any task and any new scalar gets a chart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_train.report.read import Point, RunRecord

_MOST_POINTS = 600  # more than a chart has pixels across


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        run: index of the run.
        kind: name within the run: training, evaluation, top1.
        values: None where a value was not finite.
    """

    run: int
    kind: str
    steps: list[float]
    values: list[float | None]

    @property
    def evaluated(self) -> bool:
        return self.kind != "training"


@dataclass(frozen=True)
class Chart:
    """The curves of one quantity in one stage; `percent`: the values are fractions, shown as percents."""

    stage: str
    title: str
    curves: list[Curve]
    percent: bool = False

    @property
    def name(self) -> str:
        """The chart's file name, without suffix."""
        words = "".join(letter if letter.isalnum() else "_" for letter in f"{self.stage}-{self.title}".lower())
        return words.replace("per_second", "s")


def charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Returns the charts, by stage in the order of the stages."""
    stages = dict.fromkeys(stage for run in runs for stage in run.stages)
    return [chart for stage in stages for chart in _of_stage(stage, runs)]


def _of_stage(stage: str, runs: Sequence[RunRecord]) -> list[Chart]:
    names = list(dict.fromkeys(point.name for run in runs for point in run.points if point.stage == stage))
    accuracies = [name for name in names if name.startswith("eval_top")]
    groups: list[tuple[str, dict[str, str]]] = [("loss", {"loss": "training", "eval_loss": "evaluation"})]
    if accuracies:
        groups.append(("accuracy", {"score": "training", **{name: name.removeprefix("eval_") for name in accuracies}}))
    groups += [("learning rate", {"lr": "training"}), ("samples per second", {"samples_per_second": "training"})]
    taken = {name for _, kinds in groups for name in kinds} | {"eval_count"}
    for name in names:
        if name not in taken:
            evaluated = name.startswith("eval_")
            groups.append((name.removeprefix("eval_"), {name: "evaluation" if evaluated else "training"}))
    made = []
    for title, kinds in groups:
        curves = [
            _curve(number, kind, run.curve(stage, name))
            for number, run in enumerate(runs)
            for name, kind in kinds.items()
            if name in names
        ]
        drawn = [curve for curve in curves if curve.steps]
        if drawn:
            made.append(Chart(stage, title, drawn, percent=title == "accuracy"))
    return made


def _curve(run: int, kind: str, points: Sequence[Point]) -> Curve:
    # The first step logs a rate of 0: nothing was measured yet.
    shown = [point for point in points if not (point.name == "samples_per_second" and not point.value)]
    size = -(-len(shown) // _MOST_POINTS) or 1
    pieces = [shown[start : start + size] for start in range(0, len(shown), size)]
    return Curve(run, kind, [_mean([p.step for p in piece]) or 0.0 for piece in pieces], [_value(p) for p in pieces])


def _value(points: Sequence[Point]) -> float | None:
    return _mean([point.value for point in points])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
