"""An evaluation's details equal a plain computation over the whole set, on any number of ranks."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import nn
from torchvision.io import decode_png

from dist_train.data.arrays import Batch, ImageArrays
from dist_train.data.augment.steps import Augmentation
from dist_train.data.loader import EvaluationLoader, Source
from dist_train.distributed.world import World
from dist_train.tasks import Classification, Task
from dist_train.training.evaluate import evaluate
from dist_train.training.evaluation_details import WORST, Details
from tests.support.ranks import call

SIZES = (101, 5)
CLASSES = 7
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def data(size: int) -> ImageArrays:
    """Returns data with every sample three times, so that losses tie."""
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (size, 3, 4, 4), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, CLASSES, (size,), generator=generator)
    rows = torch.arange(size) % (-(-size // 3))
    return ImageArrays(images[rows], targets[rows])


def model() -> nn.Module:
    """Returns a model whose outputs do not depend on the other samples of a batch, not even in the last bits."""

    class Mean(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            centre = x.double().mean((1, 2, 3)).float().round(decimals=3)
            return -((centre[:, None] - torch.linspace(-0.5, 0.5, CLASSES)) ** 2) * 64

    return Mean().eval()


def found(world: World) -> dict[str, Any]:
    answers = {}
    for size in SIZES:
        source = Source(data(size), Augmentation([], seed=0, mean=MEAN, std=STD), world.device, False, 0, 0)
        loader = EvaluationLoader(source, 16, world.world_size, world.rank)
        evaluation = evaluate(model(), loader, Classification(CLASSES, {}), world)
        assert evaluation.details is not None
        answers[str(size)] = evaluation.details.gather(world, MEAN, STD)
    return answers


@pytest.fixture(scope="module", params=[1, 2], ids=lambda world_size: f"{world_size} ranks")
def answers(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return (
        [found(World())]
        if request.param == 1
        else call(request.param, "tests.training.test_evaluation_details_integration:found")
    )


@pytest.mark.parametrize("size", SIZES)
def test_confusion_and_accuracy_of_classes_are_those_of_all_samples(size: int, answers: list[dict[str, Any]]) -> None:
    arrays = data(size)
    scores = model()(normalized(arrays.images))
    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for target, decision in zip(arrays.targets.tolist(), scores.argmax(1).tolist(), strict=True):
        confusion[target, decision] += 1
    accuracy = confusion.diagonal() / confusion.sum(1).clamp(min=1)
    for answer in answers:
        metrics = answer[str(size)]["metrics"]
        assert metrics["confusion"] == confusion.tolist()
        assert metrics["per_class"] == pytest.approx(accuracy.tolist())


def test_a_class_s_accuracy_has_the_digits_of_its_precision_and_no_more() -> None:
    details = Details(Classification(3, {}), torch.device("cpu"))
    targets = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    outputs = F.one_hot(torch.tensor([0, 0, 0, 1, 1, 1, 1, 2]), 3).float()
    details.update(Batch(torch.arange(8), torch.zeros(8, 5), targets), outputs, torch.zeros(8), outputs.argmax(1))
    accuracies = details.gather(World(), (), ())["metrics"]["per_class"]
    assert accuracies == [0.6, 0.6666667, 0.0]
    assert torch.equal(torch.tensor(accuracies), torch.tensor([3 / 5, 2 / 3, 0]))


@pytest.mark.parametrize("size", SIZES)
def test_the_worst_samples_are_those_of_the_whole_set_with_their_own_images(
    size: int, answers: list[dict[str, Any]]
) -> None:
    arrays = data(size)
    scores = model()(normalized(arrays.images))
    losses = F.cross_entropy(scores, arrays.targets, reduction="none").tolist()
    expected = sorted(range(size), key=lambda row: (-losses[row], row))[:WORST]
    for answer in answers:
        worst = answer[str(size)]["worst"]
        assert [sample["id"] for sample in worst] == expected
        for sample in worst:
            row = sample["id"]
            assert sample["loss"] == losses[row]
            assert (sample["target"], sample["decision"]) == (int(arrays.targets[row]), int(scores[row].argmax()))
            png = torch.frombuffer(bytearray(base64.b64decode(sample["image"])), dtype=torch.uint8)
            assert torch.equal(decode_png(png), arrays.images[row])


def normalized(images: torch.Tensor) -> torch.Tensor:
    return Augmentation([], seed=0, mean=MEAN, std=STD).normalize(images)


class Distance(Task):
    """A task without classes: regression of two numbers."""

    headline = "loss"

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).square().sum(1)

    def score(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -self.loss(outputs, targets)

    def decide(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs

    def metrics(self) -> torchmetrics.MetricCollection:
        return torchmetrics.MetricCollection({})


def test_a_task_without_classes_or_images_has_its_worst_samples_all_the_same() -> None:
    details = Details(Distance(), torch.device("cpu"))
    inputs, targets = torch.zeros(40, 5), torch.stack([torch.arange(40.0), torch.full((40,), float("nan"))], 1)
    outputs = torch.zeros(40, 2)
    for rows in (slice(0, 20), slice(20, 40)):
        batch = Batch(torch.arange(40)[rows], inputs[rows], targets[rows])
        details.update(batch, outputs[rows], targets[rows, 0], outputs[rows])
    found = details.gather(World(), (), ())
    assert found["metrics"] == {}
    assert [sample["id"] for sample in found["worst"]] == list(range(39, 39 - WORST, -1))
    assert found["worst"][0] == {"id": 39, "loss": 39.0, "target": [39.0, None], "decision": [0.0, 0.0], "image": None}


def test_large_images_are_shrunk_and_those_normalized_otherwise_are_stretched() -> None:
    details = Details(Distance(), torch.device("cpu"))
    inputs = torch.linspace(-9, 9, 400).expand(1, 1, 300, 400)
    details.update(
        Batch(torch.tensor([0]), inputs, torch.zeros(1, 2)), torch.ones(1, 2), torch.ones(1), torch.ones(1, 2)
    )
    image = details.gather(World(), (0.0,), (1.0,))["worst"][0]["image"]
    pixels = decode_png(torch.frombuffer(bytearray(base64.b64decode(image)), dtype=torch.uint8))
    assert pixels.shape == (1, 120, 160)
    assert int(pixels.min()) < 5 and int(pixels.max()) > 250
