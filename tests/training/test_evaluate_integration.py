"""Evaluation counts each sample once on any number of ranks, and its metrics equal a plain computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_train.data.arrays import ImageArrays
from dist_train.data.augment.steps import Augmentation
from dist_train.data.loader import EvaluationLoader, Source
from dist_train.distributed.world import World
from dist_train.tasks import Classification
from dist_train.training.evaluate import Evaluation, agreement, evaluate
from tests.support.ranks import call

SIZES = (101, 1)
CLASSES = 7


def data(size: int) -> ImageArrays:
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (size, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return ImageArrays(images, torch.randint(0, CLASSES, (size,), generator=generator))


def model(seed: int) -> nn.Module:
    linear = nn.Linear(16, CLASSES)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(CLASSES, 16, generator=generator))
        linear.bias.copy_(torch.randn(CLASSES, generator=generator))
    return nn.Sequential(nn.Flatten(), linear).eval()


def outputs(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the outputs of the whole set at once, computed without the loader."""
    arrays = data(size)
    inputs = (arrays.images.double() / 255 - 0.5) / 0.25
    return model(seed)(inputs.float()).detach(), arrays.targets


def everything(world: World) -> dict[str, Any]:
    """Returns this rank's results for each dataset size."""
    found: dict[str, Any] = {}
    for size in SIZES:
        source = Source(data(size), Augmentation([], seed=0, mean=(0.5,), std=(0.25,)), world.device, False, 0, 0)
        task = Classification(CLASSES, {})
        left, right = (
            evaluate(model(seed), EvaluationLoader(source, 16, world.world_size, world.rank), task, world)
            for seed in (1, 2)
        )
        found[str(size)] = {
            "metrics": left.metrics,
            "decisions": left.decisions.tolist(),
            "agreement": agreement(left, right, task, world),
        }
    return found


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda world_size: f"{world_size} ranks")
def answers(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return (
        [everything(World())]
        if request.param == 1
        else call(request.param, "tests.training.test_evaluate_integration:everything")
    )


@pytest.mark.parametrize("size", SIZES)
def test_metrics_are_those_of_a_plain_computation_on_every_rank(size: int, answers: list[dict[str, Any]]) -> None:
    scores, targets = outputs(size, 1)
    top5 = (scores.topk(5, dim=1).indices == targets[:, None]).any(1).double().mean()
    for answer in answers:
        metrics = answer[str(size)]["metrics"]
        assert metrics["count"] == size and set(metrics) == {"top1", "top5", "loss", "count"}
        assert metrics["loss"] == pytest.approx(float(F.cross_entropy(scores.double(), targets)), rel=1e-6)
        assert metrics["top1"] == pytest.approx(float((scores.argmax(1) == targets).double().mean()), abs=1e-6)
        assert metrics["top5"] == pytest.approx(float(top5), abs=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_decisions_of_all_ranks_are_those_of_the_whole_set_in_order(size: int, answers: list[dict[str, Any]]) -> None:
    scores, _ = outputs(size, 1)
    assert [decision for answer in answers for decision in answer[str(size)]["decisions"]] == scores.argmax(1).tolist()


@pytest.mark.parametrize("size", SIZES)
def test_agreement_is_the_share_of_equal_decisions_over_all_ranks(size: int, answers: list[dict[str, Any]]) -> None:
    left, right = outputs(size, 1)[0].argmax(1), outputs(size, 2)[0].argmax(1)
    expected = float((left == right).double().mean())
    assert [answer[str(size)]["agreement"] for answer in answers] == [pytest.approx(expected)] * len(answers)
    assert size == 1 or 0 < expected < 1


def test_few_classes_have_no_top5() -> None:
    assert set(Classification(5, {}).metrics().keys()) == {"top1"}


def test_nothing_to_evaluate_counts_nothing() -> None:
    found: Evaluation = evaluate(model(1), [], Classification(CLASSES, {}), World())
    assert (
        found.metrics["count"] == 0
        and found.decisions.tolist() == []
        and agreement(found, found, Classification(CLASSES, {}), World()) == 0.0
    )
