"""Retention within a stage: the newest, the best, one every few hours, and the needed ones."""

from __future__ import annotations

from typing import Any

import pytest

from dist_train.config.tree import KeepConfig
from dist_train.run_dir.retention import Retention


class Hours:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return 3600 * self.now


def retention(hours: Hours | None = None, **keep: Any) -> Retention:
    return Retention(KeepConfig.model_validate(keep), hours or Hours())


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ({"last": 1, "best": 0}, {"d"}),
        ({"last": 2, "best": 0}, {"c", "d"}),
        ({"last": 9, "best": 0}, {"a", "b", "c", "d"}),
        ({"last": 1, "best": 1}, {"b", "d"}),
        ({"last": 1, "best": 2}, {"a", "b", "d"}),
    ],
)
def test_the_newest_and_the_best_stay(keep: dict[str, Any], expected: set[str]) -> None:
    assert retention(**keep).choose(["a", "b", "c", "d"], ["b", "a", "c"], set()) == expected


def test_what_is_needed_stays_whatever_the_settings_say() -> None:
    assert retention(last=1, best=0).choose(["a", "b", "c"], ["b"], {"b", "c"}) == {"b", "c"}


def test_one_stays_for_each_time_since_the_last_one_that_did() -> None:
    hours = Hours()
    made = retention(hours, last=1, best=0, every_hours=2.0)
    names = []
    for number in range(9):
        names.append(f"s{number}")
        made.note("train", names[-1])
        hours.now += 0.75
    assert made.choose(names, [], set()) == {"s3", "s6", "s8"}


def test_the_hours_count_on_across_a_restart() -> None:
    hours = Hours()
    first = retention(hours, last=1, best=0, every_hours=1.0)
    for name in ("a", "b"):
        record = first.note("train", name)
        hours.now += 1.5
    resumed = retention(hours, last=1, best=0, every_hours=1.0)
    resumed.restore(record)
    hours.now -= 0.75
    resumed.note("train", "c")
    assert resumed.choose(["a", "b", "c"], [], set()) == {"b", "c"}, "c came too early"
    hours.now += 0.5
    resumed.note("train", "d")
    resumed.note("train", "e")
    assert resumed.choose(["a", "b", "c", "d", "e"], [], set()) == {"b", "d", "e"}


def test_another_stage_begins_anew() -> None:
    hours = Hours()
    made = retention(hours, last=1, best=0, every_hours=1.0)
    for stage in ("train", "qat"):
        for number in range(3):
            record = made.note(stage, f"{stage}{number}")
            hours.now += 1.0
    assert record["hourly"] == ["qat1", "qat2"]


def test_what_an_older_one_needs_stays_with_it() -> None:
    made = retention(last=2, best=1)
    made.note("train", "a", needed="a")
    made.note("train", "b", needed="a")
    record = made.note("train", "c", needed="c")
    assert made.choose(["a", "b", "c"], ["c"], {"c"}) == {"a", "b", "c"}, "b is of no use without a"
    resumed = retention(last=2, best=1)
    resumed.restore(record)
    resumed.note("train", "d", needed="c")
    assert resumed.choose(["a", "b", "c", "d"], ["c"], {"c", "d"}) == {"c", "d"}


def test_at_the_end_of_a_stage_the_newest_stays_with_what_it_needs() -> None:
    made = retention(last=2, best=1, every_hours=1e-12)
    for name, needed in (("a", "a"), ("b", "a"), ("c", "a")):
        made.note("train", name, needed)
    assert made.at_end(["a", "b", "c"]) == {"a", "c"} and made.at_end([]) == set()
