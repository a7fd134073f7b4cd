"""Tests the warning of training that does not fit into the memory of a rank's device."""

from __future__ import annotations

import pytest
from torch import nn

from dist_train.config.fit import FitConfig
from dist_train.config.tree import Config
from dist_train.distributed.world import World
from dist_train.pipeline.memory import bytes_to_train, free_memory, little_memory


@pytest.mark.parametrize(
    ("optim", "ema", "copies"),
    [
        ({"name": "sgd", "momentum": 0.0}, None, 1),
        ({"name": "sgd", "momentum": 0.9}, None, 2),
        ({"name": "adamw"}, None, 3),
        ({"name": "adam"}, 0.9, 4),
    ],
)
def test_training_holds_gradients_states_and_the_average_beside_the_model(
    optim: dict[str, object], ema: float | None, copies: int
) -> None:
    settings = FitConfig.model_validate({"optim": {"lr": 0.1, **optim}, "ema_decay": ema})
    assert bytes_to_train(nn.Linear(9, 10), settings) == copies * 4 * 100


def test_what_is_frozen_has_no_gradients() -> None:
    model = nn.Linear(9, 10)
    model.bias.requires_grad_(False)
    settings = FitConfig.model_validate({"optim": {"name": "sgd", "lr": 0.1, "momentum": 0.9}})
    assert bytes_to_train(model, settings) == 2 * 4 * 90


def test_a_model_that_is_too_large_to_train_is_told_with_what_to_type() -> None:
    world = World(world_size=4, local_world_size=4)
    rows = 2 * free_memory(world) // 4  # on the meta device it takes no memory
    model = nn.Linear(1, rows, bias=False, device="meta")
    (problem,) = little_memory(Config.model_validate({"stages": ["train"]}), model, world)
    assert "train holds" in problem.message
    assert problem.hint == "--strategy fsdp, which spreads them over the 4 ranks"
    assert not list(little_memory(Config.model_validate({"stages": ["train"], "strategy": "fsdp"}), model, world))
    assert not list(little_memory(Config.model_validate({"stages": ["train"]}), nn.Linear(2, 2), world))
