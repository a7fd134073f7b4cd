"""Tests selection and early stopping by any metric, in its own direction."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dist_train.config.fit import FitConfig
from dist_train.training.selection import Selection


def selection(values: list[float], metric: str = "top1", **settings: Any) -> Selection:
    """Returns a selection after evaluations of `metric` every 10 steps."""
    made = Selection(FitConfig.model_validate(settings), "top1", frozenset({"loss", "mae"}))
    for number, value in enumerate(values, start=1):
        made.add(10 * number, {"top1": 0.0, metric: value})
    return made


@pytest.mark.parametrize(
    ("metric", "values", "ranking"),
    [
        ("top1", [0.1, 0.9, 0.5], [20, 30, 10]),
        ("loss", [0.1, 0.9, 0.5], [10, 30, 20]),
        ("mae", [3.0, -1.0], [20, 10]),
        ("top1", [0.5, 0.7, 0.7, 0.5], [20, 30, 10, 40]),
        ("top1", [math.nan, 0.2, math.nan, 0.3], [40, 20]),
        ("top1", [math.nan], []),
        ("top1", [], []),
    ],
)
def test_the_best_come_first_in_the_metrics_own_direction(metric: str, values: list[float], ranking: list[int]) -> None:
    found = selection(values, metric, select_by=metric)
    assert found.ranking == ranking and found.best_step == (ranking[0] if ranking else None)


def test_the_tasks_headline_is_what_decides_where_nothing_is_named() -> None:
    assert selection([0.3]).metric == "top1" and selection([0.3], "loss", select_by="loss").metric == "loss"


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "stops_after"),
    [
        ([0.1, 0.2, 0.2, 0.2], 2, 0.0, 4),
        ([0.1, 0.2, 0.1, 0.3, 0.3], 2, 0.0, None),
        ([0.5, 0.4], 1, 0.0, 2),
        # Small gains add up, as each is measured from the last improvement that counted.
        ([0.50, 0.54, 0.58, 0.62, 0.66], 4, 0.125, None),
        ([0.50, 0.54, 0.58, 0.62, 0.66], 4, 0.25, 5),
        ([0.25, 0.5], 1, 0.25, None),
        ([math.nan, math.nan], 2, 0.0, 2),
        ([math.nan, 0.1, math.nan], 2, 0.0, None),
    ],
)
def test_patience_counts_evaluations_without_an_improvement(
    values: list[float], patience: int, min_delta: float, stops_after: int | None
) -> None:
    settings = {"early_stopping": {"patience": patience, "min_delta": min_delta}}
    stopped = [count for count in range(1, len(values) + 1) if selection(values[:count], **settings).stop]
    assert (stopped[0] if stopped else None) == stops_after
    lower = [count for count in range(1, len(values) + 1) if _falling(values[:count], settings).stop]
    assert lower == stopped, "what falls is judged as its mirror image"


def _falling(values: list[float], settings: dict[str, Any]) -> Selection:
    return selection([-value for value in values], "loss", select_by="loss", **settings)


def test_without_early_stopping_nothing_stops() -> None:
    assert not selection([0.5] * 100).stop


def test_the_history_is_all_that_a_resumed_selection_needs() -> None:
    settings: dict[str, Any] = {"early_stopping": {"patience": 2}}
    before = selection([0.3, 0.2], **settings)
    after = selection([], **settings)
    after.restore([list(each) for each in before.history])
    for each in (before, after):
        each.add(30, {"top1": 0.1})
    assert after.stop and before.stop and after.ranking == before.ranking == [10, 20, 30]
