"""Recalibrated statistics of a moving average are equal on three real ranks, and equal to those of one process."""

from __future__ import annotations

import pytest

from dist_train.distributed.world import World
from tests.support.ranks import call
from tests.support.recalibration_ranks import BRIGHTEST, reestimated

BACKENDS = ["pt2e", "fx", "eager"]


@pytest.mark.slow  # a second, but three starts of torch
def test_three_ranks_estimate_the_moments_and_ranges_that_one_process_does() -> None:
    alone, ranks = reestimated(World(), BACKENDS), call(3, "tests.support.recalibration_ranks:reestimated", BACKENDS)
    for name in BACKENDS:
        assert all(rank[name] == ranks[0][name] for rank in ranks), f"{name}: each rank has the same, to the bit"
        expected, found = alone[name]["after"], ranks[0][name]["after"]
        for kind in ("moments", "low", "high"):
            assert found[kind] == pytest.approx(expected[kind], rel=1e-5, abs=1e-6), (name, kind)
            assert alone[name]["before"][kind] != pytest.approx(expected[kind], rel=1e-2), "it was another one"
        assert found["high"][0] == BRIGHTEST, "one pixel of one batch of the last rank"
