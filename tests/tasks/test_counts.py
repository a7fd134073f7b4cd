"""Counts equal torchmetrics' to the bit, and no tensor of samples x classes^2 is made for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassJaccardIndex,
    MultilabelAveragePrecision,
    MultilabelConfusionMatrix,
)

from dist_train import registry
from dist_train.tasks import Classification, Task
from dist_train.tasks.counter import Counts
from dist_train.tasks.counts import _FEW, DENSE_CLASSES, MOST_PAIRS, ConfusedPairs
from dist_train.tasks.label_counts import LabelPrecision
from tests.support.torch_settings import own_torch_settings

THRESHOLDS = 201


@pytest.fixture
def _deterministic() -> Iterator[None]:
    """Sets torch as `run.deterministic` does, and makes an operation that has no deterministic form an error."""
    with own_torch_settings():
        torch.use_deterministic_algorithms(True)
        yield


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)), 0)
        return result


def task(name: str, outputs: int, **args: Any) -> Task:
    made: Task = registry.tasks.get(name)(outputs, args)
    return made


def batches(*shape: int, top: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Returns batches of different sizes: outputs, of which some tie, and targets below `top`, right for a third."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in (17, 1, 30):
        outputs = torch.randn(size, *shape, generator=generator).round(decimals=1)
        targets = torch.randint(0, top, (size, *shape[1:]), generator=generator)
        right = torch.rand(targets.shape, generator=generator) < 1 / 3
        made.append((outputs, torch.where(right, outputs.argmax(1).clamp(max=top - 1), targets)))
    return made


def updated(metrics: Any, given: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    collection = torchmetrics.MetricCollection(metrics) if isinstance(metrics, dict) else metrics
    for outputs, targets in given:
        collection.update(outputs, targets)
    return dict(collection.compute())


def states(collection: Any) -> list[Tensor]:
    """Returns all tensors that metrics keep between updates."""
    if isinstance(collection, Counts):
        kept: Any = [vars(counter) for counter in collection.values()]
    else:
        kept = [getattr(metric, name) for metric in collection.modules() for name in getattr(metric, "_defaults", ())]
    return [leaf for leaf in tree_leaves(kept) if isinstance(leaf, Tensor)]


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("classes", [2, 7, DENSE_CLASSES])
def test_classification_has_the_values_of_torchmetrics(classes: int) -> None:
    given = batches(classes, top=classes - (classes > 2))
    reference = {
        "top1": MulticlassAccuracy(classes, average="micro"),
        "confusion": MulticlassConfusionMatrix(classes),
        "per_class": MulticlassAccuracy(classes, average="none"),
    }
    if classes > 5:
        reference["top5"] = MulticlassAccuracy(classes, top_k=5, average="micro")
    made = task("classification", classes)
    found = updated(made.metrics(), given) | updated(made.details(), given)
    assert set(found) == set(reference)
    require_equal(found, updated(torchmetrics.MetricCollection(reference, compute_groups=False), given))


@pytest.mark.parametrize("ignored", [255, -100, 0, 2])
@pytest.mark.parametrize("classes", [3, 9])
def test_segmentation_has_the_values_of_torchmetrics(classes: int, ignored: int) -> None:
    given = batches(classes, 4, 5, top=classes - 1)
    for number, (_, targets) in enumerate(given):
        targets[number % 2 :, 0] = ignored
    reference = {
        "mean_iou": MulticlassJaccardIndex(classes, average="macro", ignore_index=ignored),
        "pixel_accuracy": MulticlassAccuracy(classes, average="micro", ignore_index=ignored),
        "confusion": MulticlassConfusionMatrix(classes, ignore_index=ignored),
        "per_class": MulticlassJaccardIndex(classes, average="none", ignore_index=ignored),
    }
    made = task("segmentation", classes, ignore_index=ignored)
    found = updated(made.metrics(), given) | updated(made.details(), given)
    assert set(found) == set(reference)
    require_equal(found, updated(torchmetrics.MetricCollection(reference, compute_groups=False), given))


@pytest.mark.parametrize("labels", [2, 11])
def test_multilabel_has_the_values_of_torchmetrics(labels: int) -> None:
    generator = torch.Generator().manual_seed(labels)
    # Half of the scores lie on a threshold, which counts as reached.
    scores = torch.rand(60, labels, generator=generator)
    scores[::2] = torch.linspace(0, 1, THRESHOLDS)[torch.randint(0, THRESHOLDS, (30, labels), generator=generator)]
    targets = torch.randint(0, 2, (60, labels), generator=generator)
    given = [(scores[:23], targets[:23]), (scores[23:], targets[23:])]
    ours, theirs = (
        LabelPrecision(labels, thresholds=THRESHOLDS),
        MultilabelAveragePrecision(labels, thresholds=THRESHOLDS),
    )
    require_equal(updated({"map": ours}, given), updated({"map": theirs}, given))
    assert torch.equal(ours.confmat, theirs.confmat)

    logits = [(torch.logit(outputs, eps=1e-4), targets) for outputs, targets in given]
    found = updated(task("multilabel", labels).details(), logits)["label_confusion"]
    decided = [((outputs > 0).long(), targets) for outputs, targets in logits]
    require_equal({"it": found}, updated({"it": MultilabelConfusionMatrix(labels)}, decided))


@pytest.mark.parametrize("classes", [DENSE_CLASSES + 1, 300])
def test_the_pairs_of_many_classes_are_the_cells_of_the_confusion_matrix(classes: int) -> None:
    # 90,000 samples are more than the codes that wait for a merge.
    generator = torch.Generator().manual_seed(1)
    decisions, targets = (torch.randint(0, classes, (9, 10_000), generator=generator) for _ in range(2))
    pairs, cells = ConfusedPairs(classes), np.zeros((classes, classes), dtype=np.int64)
    for row in range(9):
        pairs.update(torch.nn.functional.one_hot(decisions[row], classes), targets[row])
        np.add.at(cells, (targets[row].numpy(), decisions[row].numpy()), 1)
        assert sum(map(len, pairs.codes)) <= 2 * _FEW
    found, matrix = pairs.compute(), torch.from_numpy(cells)
    wrong = matrix.clone().fill_diagonal_(0)
    assert {name: int(found[name]) for name in ("num_pairs", "num_wrong", "num_samples")} == {
        "num_pairs": int((wrong > 0).sum()),
        "num_wrong": int(wrong.sum()),
        "num_samples": 90_000,
    }
    expected = sorted((-int(wrong[t, d]), t, d) for t, d in wrong.nonzero().tolist())[:MOST_PAIRS]
    totals = matrix.sum(1).tolist()
    assert found["confused_pairs"].tolist() == [[t, d, -count, totals[t]] for count, t, d in expected]


def test_many_classes_without_a_mistake_have_no_pairs() -> None:
    found = updated(task("classification", 1000).details(), [(torch.eye(1000)[:20], torch.arange(20))])
    assert found["confused_pairs"].shape == (0, 4)
    assert [int(found[name]) for name in ("num_pairs", "num_wrong", "num_samples")] == [0, 0, 20]


@pytest.mark.usefixtures("_deterministic")
def test_the_record_sees_what_torchmetrics_makes() -> None:
    with Largest() as record:
        MulticlassConfusionMatrix(20).update(torch.zeros(16, 20), torch.zeros(16, dtype=torch.int64))
    assert record.numel == 16 * 20**2


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("classes", [DENSE_CLASSES, 1000, 21_841])
@pytest.mark.parametrize("name", ["classification", "segmentation", "multilabel"])
def test_an_evaluation_s_memory_follows_samples_and_classes(name: str, classes: int) -> None:
    made, size, pixels = task(name, classes), 24, 4 if name == "segmentation" else 1
    shape = (size, classes, 2, 2) if name == "segmentation" else (size, classes)
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(shape, generator=generator)
    if name == "multilabel":
        targets = torch.randint(0, 2, shape, generator=generator)
    else:
        targets = torch.randint(0, classes, (size, *shape[2:]), generator=generator)
    collections = [made.metrics(), made.details()]
    with Largest() as record:
        for _ in range(3):
            for collection in collections:
                collection.update(outputs, targets)
        found = [collection.compute() for collection in collections]
    per_class = (THRESHOLDS + 1) * 4 if name == "multilabel" else 3
    matrix = classes**2 if name != "multilabel" and classes <= DENSE_CLASSES else 0
    assert record.numel <= max(size * pixels * classes, per_class * classes, matrix)
    kept = sum(tensor.numel() for each in collections for tensor in states(each))
    assert 0 < kept <= (2 * per_class + 20) * classes + 6 * size * pixels + matrix
    reported = {key: value.numel() for values in found for key, value in values.items()}
    assert max(reported.values()) <= max(4 * classes, 4 * size * pixels, matrix)


def test_a_task_may_add_metrics_of_torchmetrics_to_those_of_classification() -> None:
    class WithF1(Classification):
        def metrics(self) -> Any:
            made: Any = super().metrics()
            made.add_metrics({"f1": torchmetrics.classification.MulticlassF1Score(3, average="macro")})
            return made

    metrics = WithF1(3, {}).metrics().to(torch.device("cpu"))
    outputs, targets = torch.eye(3)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2])
    metrics.update(outputs, targets)
    found = metrics.compute()
    assert list(metrics) == ["top1", "f1"] and found["top1"] == 0.75
    assert float(found["f1"]) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
