"""Frozen parts, groups and schedules on real ranks: one model at any number of ranks, and no complaint of DDP's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_train.config.tree import Config
from dist_train.distributed.world import World
from dist_train.models.recomputation import Recomputation
from dist_train.training.freezing import Freezing
from dist_train.training.loop import fit
from dist_train.training.parts import resolve_parts
from tests.support.ranks import call
from tests.support.training_loops import CLASSES, flat, make

GROUPS = [{"match": "3.weight", "lr": 0.3, "weight_decay": 0.1}, {"match": "*.bias", "lr": 0.05}]


def plain() -> nn.Module:
    """Layers without batch norms: equal at any world size. The first is frozen at the beginning."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def normed() -> nn.Module:
    torch.manual_seed(1)
    conv, norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
    return nn.Sequential(nn.Identity(), nn.Sequential(conv, norm), nn.Flatten(), nn.Linear(12, CLASSES))


def trained(world: World, model: nn.Module, unfreeze_at: int | None, recomputed: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "freeze": ["1"],
        "unfreeze_at": unfreeze_at,
        "optim": {"lr": 0.1, "weight_decay": 0.01, "groups": GROUPS},
        "schedule": {"name": "OneCycleLR", "warmup": 0.2},
        "ema_decay": 0.8,
    }
    made = make(world, model, epochs=3, config=settings)
    learner, before = made.run.learner, [each.clone() for each in model[1].state_dict().values()]  # type: ignore[index]
    learner.parts = resolve_parts(Config.model_validate({"train": settings}), "train", model)
    learner.freezing = Freezing(model, learner.reduction, learner.parts, {}, unfreeze_at)
    learner._recomputation = Recomputation(model, recomputed)
    if unfreeze_at is None:
        learner.freezing.enter(0)
    state = fit(made.run, None)
    same = all(
        torch.equal(one, two)
        for one, two in zip(before, model[1].state_dict().values(), strict=True)  # type: ignore[index]
    )
    return {
        "losses": made.recorder.of("loss"),
        "rates": made.recorder.of("lr"),
        "model": flat(model),
        "average": flat(state.chosen),
        "buffers": [float(each.double().sum()) for each in model.buffers()],
        "same": same,
    }


def of_plain(world: World, unfreeze_at: int | None) -> dict[str, Any]:
    return trained(world, plain(), unfreeze_at, [])


def of_normed(world: World, unfreeze_at: int | None, recomputed: list[str]) -> dict[str, Any]:
    return trained(world, normed(), unfreeze_at, recomputed)


@pytest.mark.slow
@pytest.mark.parametrize("unfreeze_at", [None, 1])
def test_losses_are_those_of_one_rank_on_two_and_three(unfreeze_at: int | None) -> None:
    alone = of_plain(World(), unfreeze_at)
    assert alone["same"] == (unfreeze_at is None)
    for ranks in (2, 3):
        for found in call(ranks, f"{__name__}:of_plain", unfreeze_at):
            assert found["rates"] == alone["rates"] and found["same"] == alone["same"]
            for key in ("losses", "model", "average"):
                assert found[key] == pytest.approx(alone[key], abs=2e-5), key


def test_frozen_statistics_keep_every_bit_on_three_ranks() -> None:
    """The mean of three equal values over ranks is not always that value."""
    found = call(3, f"{__name__}:of_normed", None, [])
    assert all(each["same"] for each in found)


@pytest.mark.parametrize("unfreeze_at", [None, 1])
@pytest.mark.slow
def test_recomputing_changes_no_bit_on_two_ranks(unfreeze_at: int | None) -> None:
    without = call(2, f"{__name__}:of_normed", unfreeze_at, [])
    assert without == call(2, f"{__name__}:of_normed", unfreeze_at, ["1"])
