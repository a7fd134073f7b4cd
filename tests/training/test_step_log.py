"""Tests the step log: data wait and gradient norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dist_train.distributed.world import World
from dist_train.training.loop import fit
from dist_train.training.step_log import DataClock
from tests.support.ranks import call
from tests.support.training_loops import Watch, flat, make, mlp


class Clock:
    """A clock that only the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("dist_train.training.step_log.time.monotonic", lambda: self.now)

    def slowly(self, items: int, seconds: float) -> Iterator[int]:
        for item in range(items):
            self.now += seconds
            yield item


def test_the_wait_is_a_share_of_the_time_since_it_was_asked_for_last(monkeypatch: pytest.MonkeyPatch) -> None:
    time, clock, shares = Clock(monkeypatch), DataClock(), []
    for _ in clock.timed(time.slowly(3, seconds=1.0)):
        time.now += 3.0
        shares.append(clock.share())
    assert shares == [0.25, 0.25, 0.25]
    for item in clock.timed(time.slowly(4, seconds=3.0)):
        time.now += 1.0
        shares += [clock.share()] if item == 3 else []
    assert shares[3:] == [0.75], "of all four"


def test_what_happens_between_epochs_is_neither_waiting_nor_work(monkeypatch: pytest.MonkeyPatch) -> None:
    time, clock = Clock(monkeypatch), DataClock()
    for _ in range(2):
        for _ in clock.timed(time.slowly(2, seconds=1.0)):
            time.now += 1.0
        time.now += 1000.0
    assert clock.share() == 0.5
    assert clock.share() == 0.0, "nothing since then"


@pytest.mark.parametrize("bound", [None, 1e-3])
def test_the_norm_is_that_of_the_gradients_before_clipping(bound: float | None) -> None:
    """With learning rate 1 and no momentum, an unclipped update equals the gradient."""
    model = mlp()
    watch = Watch(lambda: torch.tensor(flat(model)))
    made = make(
        World(), model, hooks=[watch], config={"optim": {"lr": 1.0, "momentum": 0}, "schedule": {"name": "constant"}}
    )
    fit(made.run, None)
    after = [*watch.seen[1:], torch.tensor(flat(model))]
    moved = [float((new - old).norm()) for old, new in zip(watch.seen, after, strict=True)]
    assert made.recorder.of("grad_norm") == pytest.approx(moved, rel=1e-3)

    model = mlp()
    clipped = make(World(), model, config={"clip_grad_norm": bound, "optim": {"lr": 1.0, "momentum": 0}})
    fit(clipped.run, None)
    assert clipped.recorder.of("grad_norm")[0] == pytest.approx(moved[0], rel=1e-3)


def test_only_logged_steps_are_measured_and_the_result_is_the_same_to_the_bit() -> None:
    found = []
    for every in (1, 3):
        model = mlp()
        made = make(World(), model, log_every=every)
        fit(made.run, None)
        found.append(flat(model))
        logged = [line["step"] for line in made.recorder.lines if "grad_norm" in line]
        assert logged == [line["step"] for line in made.recorder.lines if "loss" in line]
        assert logged == (list(range(8)) if every == 1 else [0, 3, 6, 7])
        assert all(0 <= share <= 1 for share in made.recorder.of("data_wait"))
    assert found[0] == found[1]


def _normed(world: World) -> dict[str, Any]:
    model = mlp()
    made = make(world, model, epochs=9, config={"optim": {"lr": 1e-12}, "early_stopping": {"patience": 2}})
    return {"steps": fit(made.run, None).step, "norms": made.recorder.of("grad_norm")}


@pytest.mark.slow
def test_all_ranks_measure_the_norm_of_the_global_batch_and_stop_at_the_same_evaluation() -> None:
    alone = _normed(World())
    ranks = call(2, "tests.training.test_step_log:_normed")
    assert ranks[0] == ranks[1] and ranks[0]["steps"] == alone["steps"] == 12
    assert ranks[0]["norms"] == pytest.approx(alone["norms"], rel=1e-4)
