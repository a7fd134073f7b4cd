"""Ranks with uneven shares count together what one process counts alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_train import registry
from dist_train.distributed.world import World
from tests.support.ranks import call
from tests.support.torch_settings import own_torch_settings

CASES = (("classification", 7), ("classification", 1000), ("segmentation", 300), ("multilabel", 9))
# Of one sample only the first rank has a share; of three without a mistake no rank has pairs.
SIZES = (41, 1, -3)


def found(world: World) -> dict[str, Any]:
    """Returns this rank's results for each task and size; a negative size is of samples that are all right."""
    with own_torch_settings():
        torch.use_deterministic_algorithms(True)
        return {
            f"{name} {classes} {size}": _found(world, name, classes, size) for name, classes in CASES for size in SIZES
        }


def _found(world: World, name: str, classes: int, size: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(classes)
    shape = (abs(size), classes, 2, 3) if name == "segmentation" else (abs(size), classes)
    outputs = torch.randn(shape, generator=generator)
    if name == "multilabel":
        targets = (outputs + torch.randn(shape, generator=generator) > 0).long()
    else:
        answers = outputs.argmax(1)
        lost = torch.rand(answers.shape, generator=generator) < (size > 0) * 0.7
        targets = torch.where(lost, torch.randint(0, classes, answers.shape, generator=generator), answers)
    task = registry.tasks.get(name)(classes, {})
    values = {}
    for collection in (task.metrics(), task.details()):
        # The first rank has two of three samples.
        for row in range(abs(size)):
            if world.world_size == 1 or (row % 3 == 2) == bool(world.rank):
                collection.update(outputs[row : row + 1], targets[row : row + 1])
        values.update({key: value.tolist() for key, value in collection.compute().items()})
    return values


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return found(World())


def test_two_ranks_count_what_one_does(alone: dict[str, Any]) -> None:
    for answer in call(2, "tests.tasks.test_counts_integration:found"):
        assert answer == alone


def test_mistakes_of_many_classes_are_there_to_be_counted(alone: dict[str, Any]) -> None:
    few, none = (alone[f"classification 1000 {size}"] for size in (41, -3))
    assert few["num_samples"] == 41 and few["num_wrong"] == len(few["confused_pairs"]) > 20
    assert none["num_wrong"] == 0 and none["top1"] == 1.0
