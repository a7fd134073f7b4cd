"""Ranges on three real ranks equal each other and those of one process; with stock fake quantization they do not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.range_ranks import EXTREME, STEPS
from tests.support.ranks import call

pytestmark = pytest.mark.slow  # a few steps, but three starts of torch


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = call(3, "tests.support.range_ranks:everything")
    return found


def same_on_all_ranks(found: list[dict[str, Any]]) -> bool:
    return all(each["ends"] == found[0]["ends"] for each in found)


def as_one_process(found: list[dict[str, Any]]) -> bool:
    """To rounding: a layer's outputs depend on the size of the batch in the last bits."""
    return all(
        ours == pytest.approx(alone, rel=1e-4, abs=1e-5)
        for each in found
        for ours, alone in zip(each["ends"], each["alone"], strict=True)
    )


@pytest.mark.parametrize("observer", ["moving_average", "min_max"])
def test_ranges_are_equal_on_all_ranks_at_every_step_and_those_of_one_process(
    observer: str, ranks: list[dict[str, Any]]
) -> None:
    found = [rank[observer] for rank in ranks]
    assert same_on_all_ranks(found) and as_one_process(found)
    assert all(each["digests"] == found[0]["digests"] for each in found)
    assert len(set(found[0]["digests"])) == STEPS or observer == "min_max", "they follow the steps"
    assert found[0]["ends"][0][2] == EXTREME, "the extreme value is in one micro-batch of one rank"


def test_a_step_costs_one_collective_besides_the_gradients(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["moving_average"]["collectives"] == [1] * STEPS for rank in ranks)


def test_stock_fake_quantization_under_ddp_fails_both(ranks: list[dict[str, Any]]) -> None:
    found = [rank["stock"] for rank in ranks]
    assert not same_on_all_ranks(found)
    assert not as_one_process(found)
    assert found[0]["ends"][0][2] < EXTREME / 2, "rank 0, whose buffers are saved, has not seen the extreme value"


@pytest.mark.parametrize(("method", "collectives"), [("min_max", 1), ("percentile", 2), ("mse", 2)])
def test_first_ranges_do_not_depend_on_the_number_of_ranks(
    method: str, collectives: int, ranks: list[dict[str, Any]]
) -> None:
    found = [rank["ptq"][method] for rank in ranks]
    assert same_on_all_ranks(found)
    ends, alone = found[0]["ends"], found[0]["alone"]
    assert (ends[0], ends[2]) == (alone[0], alone[2])
    assert ends == pytest.approx(alone, rel=0.02), "to a bin: behind a layer the last bits depend on the batch"
    assert [each["collectives"] for each in found] == [collectives] * 3
    assert (ends[2] < 39) == (method != "min_max"), "clipping leaves the one extreme value out"
