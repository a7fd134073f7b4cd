"""Tests torch's schedules by name: rates, ratios of groups, warm-up, plateaus, and exact resumption of each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR

import dist_train
from dist_train.config.fit import GroupConfig, OptimConfig, ScheduleConfig
from dist_train.errors import SetupError
from dist_train.registry.torch_names import OWN_SCHEDULES, SCHEDULES
from dist_train.run_dir.state_codec import decode, encode
from dist_train.training.optim import build_optimizer
from dist_train.training.schedule import Schedule, build_schedule

TOTAL, EPOCH = 20, 5
ARGS: dict[str, dict[str, Any]] = {
    "MultiStepLR": {"milestones": [3, 6]},
    "StepLR": {"step_size": 3},
    "ExponentialLR": {"gamma": 0.9},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 4},
    "ReduceLROnPlateau": {"patience": 0, "cooldown": 1},
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR warns about its own start
        yield


class Training:
    """A model of two layers, of which the second has a tenth of the rate."""

    def __init__(self, schedule: ScheduleConfig, optim: str = "SGD", total: int = TOTAL) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        config = OptimConfig(name=optim, lr=0.1, groups=[GroupConfig(match="1", lr=0.01)])
        self.optimizer = build_optimizer(self.model, config, groups=[frozenset({"1.weight", "1.bias"})])
        self.schedule: Schedule = build_schedule(self.optimizer, schedule, total, EPOCH, "loss")
        self.rates: list[list[float]] = []
        self.momenta: list[float] = []

    def run(self, first: int, last: int) -> Training:
        for step in range(first, last):
            self.rates.append([group["lr"] for group in self.optimizer.param_groups])
            self.momenta.append(self.optimizer.param_groups[0].get("momentum", math.nan))
            self.optimizer.zero_grad()
            self.model(torch.ones(2, 3) * step / TOTAL).square().mean().backward()
            self.optimizer.step()
            self.schedule.step()
            if (step + 1) % EPOCH == 0:
                self.schedule.end_epoch({"loss": 1.0 + step // 10})
        return self

    def state(self) -> list[Any]:
        return [self.model.state_dict(), self.optimizer.state_dict(), self.schedule.state_dict()]

    def resumed(self, state: list[Any]) -> Training:
        for part, kept in zip((self.model, self.optimizer, self.schedule), state, strict=True):
            part.load_state_dict(kept)
        return self


def all_named() -> Iterator[Any]:
    for name in (*SCHEDULES, *OWN_SCHEDULES):
        for warmup in (0.0, 0.2):
            for every in ("step",) if name in OWN_SCHEDULES else ("step", "epoch"):
                yield pytest.param(name, warmup, every, id=f"{name}-{warmup}-{every}")


@pytest.mark.parametrize(("name", "warmup", "every"), all_named())
def test_each_goes_on_to_the_bit_and_keeps_the_ratio_of_a_group(name: str, warmup: float, every: str) -> None:
    config = ScheduleConfig.model_validate(
        {"name": name, "warmup": warmup, "every": every, "args": ARGS.get(name, {}), "final": 0.1}
    )
    whole = Training(config).run(0, TOTAL)
    for stop in (2, 7, 10):  # within the warm-up, within an epoch, at an epoch's end
        before = Training(config).run(0, stop)
        after = Training(config).resumed(decode(*encode(before.state()))).run(stop, TOTAL)
        assert before.rates + after.rates == whole.rates
        assert before.momenta + after.momenta == whole.momenta
        for mine, theirs in zip(after.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    for base, _, group, _ in whole.rates:
        assert group == pytest.approx(base / 10)


def test_a_schedule_is_torchs_own_step_by_step() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    expected: LRScheduler = OneCycleLR(optimizer, 0.3, total_steps=TOTAL)
    mine = Training(ScheduleConfig(name="OneCycleLR", args={"max_lr": 0.3})).run(0, TOTAL)
    for rates, momentum in zip(mine.rates, mine.momenta, strict=True):
        assert rates[0] == optimizer.param_groups[0]["lr"], "a schedule that steps twice a step is ahead here"
        assert momentum == optimizer.param_groups[0]["momentum"]
        optimizer.step()
        expected.step()


def test_every_epoch_steps_once_an_epoch() -> None:
    mine = Training(ScheduleConfig(name="ExponentialLR", every="epoch", args={"gamma": 0.5})).run(0, TOTAL)
    assert [rates[0] for rates in mine.rates] == [0.1 * 0.5 ** (step // EPOCH) for step in range(TOTAL)]


def test_warm_up_rises_to_the_first_rate_and_then_the_schedule_begins() -> None:
    mine = Training(ScheduleConfig(name="CosineAnnealingLR", warmup=0.2)).run(0, TOTAL)
    rates = [each[0] for each in mine.rates]
    assert rates[:5] == pytest.approx([0.001, 0.02575, 0.0505, 0.07525, 0.1])
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] < 0.002


def test_a_plateau_is_of_the_metric_and_not_of_steps_in_the_warm_up() -> None:
    config = ScheduleConfig(name="ReduceLROnPlateau", args={"factor": 0.1, "patience": 0}, warmup=0.5)
    training = Training(config).run(0, 10)  # two evaluations within the warm-up do not count
    training.run(10, 15)
    assert training.optimizer.param_groups[0]["lr"] == 0.1
    training.schedule.end_epoch({"loss": 2.5})  # 2.0 was the first that counts
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    training.schedule.end_epoch(None)  # an epoch without an evaluation
    assert training.optimizer.param_groups[2]["lr"] == pytest.approx(0.001)


@pytest.mark.parametrize(("lower", "values"), [(True, [1.0, 0.5, 0.2]), (False, [0.2, 0.5, 1.0])])
def test_an_improving_metric_is_no_plateau(lower: bool, values: list[float]) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    config = ScheduleConfig(name="ReduceLROnPlateau", args={"patience": 0})
    schedule = build_schedule(optimizer, config, TOTAL, EPOCH, "top1", lower)
    for value in values:
        schedule.step()
        schedule.end_epoch({"top1": value})
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_too_short_a_cycle_is_refused_before_it_ends_the_run() -> None:
    with pytest.raises(SetupError, match="OneCycleLR has 10 steps, and the stage has 20"):
        Training(ScheduleConfig(name="OneCycleLR", args={"total_steps": 10}))


@dist_train.register_schedule("downhill")
def downhill(optimizer: torch.optim.Optimizer, total_steps: int, least: float) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: least if step > 2 else 1.0)


@pytest.mark.parametrize("least", [-1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused_with_its_step(least: float) -> None:
    training = Training(ScheduleConfig(name="downhill", args={"least": least}))
    with pytest.raises(SetupError, match="the schedule LambdaLR gives the learning rate .* after 3 steps"):
        training.run(0, TOTAL)


@dist_train.register_schedule("half_then_cosine")
def half_then_cosine(optimizer: torch.optim.Optimizer, total_steps: int, final: float = 0.0) -> LRScheduler:
    return CosineAnnealingLR(optimizer, total_steps, eta_min=final)


@dist_train.register_schedule("no_schedule")
def no_schedule(optimizer: torch.optim.Optimizer, total_steps: int) -> int:
    return total_steps


def test_a_registered_schedule_gets_the_number_of_steps() -> None:
    theirs = Training(ScheduleConfig(name="half_then_cosine", warmup=0.2)).run(0, TOTAL)
    mine = Training(ScheduleConfig(name="CosineAnnealingLR", warmup=0.2)).run(0, TOTAL)
    assert theirs.rates == mine.rates
    with pytest.raises(SetupError, match="returned a int"):
        Training(ScheduleConfig(name="no_schedule"))


def test_a_group_has_its_rate_after_a_resume_with_torchs_older_states() -> None:
    """States from before schedules had a lead: of a torch scheduler that knew both groups."""
    config = ScheduleConfig(name="cosine")
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=0.1)
    older = CosineAnnealingLR(optimizer, TOTAL)
    for _ in range(7):
        older.step()
    fresh = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=0.1)
    schedule = build_schedule(fresh, config, TOTAL, EPOCH)
    fresh.load_state_dict(optimizer.state_dict())
    schedule.load_state_dict(older.state_dict())
    for _ in range(TOTAL - 7):
        older.step()
        schedule.step()
        assert [group["lr"] for group in fresh.param_groups] == [group["lr"] for group in optimizer.param_groups]
