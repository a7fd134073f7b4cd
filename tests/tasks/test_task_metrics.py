"""Tasks: losses, scores and metrics against plain computations, and refused targets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dist_train import registry
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, DataError
from dist_train.tasks import Task
from dist_train.training.evaluate import Evaluation, agreement
from tests.support.ranks import call


def task(name: str, outputs: int, **args: Any) -> Task:
    made: Task = registry.tasks.get(name)(outputs, args)
    return made


def measured(made: Task, outputs: torch.Tensor, targets: torch.Tensor, details: bool = False) -> dict[str, Any]:
    """Metrics of two updates."""
    metrics = made.details() if details else made.metrics()
    half = len(outputs) // 2
    for rows in (slice(half), slice(half, None)):
        metrics.update(outputs[rows], targets[rows])
    return {name: value.tolist() for name, value in metrics.compute().items()}


def test_every_task_orders_by_a_metric_that_it_has() -> None:
    for name in ("classification", "multilabel", "regression", "segmentation", "tokens"):
        made = task(name, 3)
        assert made.headline in made.metrics()
        assert made.lower_is_better <= {*made.metrics(), "loss"}


def test_classification_details_are_the_confusion_matrix_and_the_accuracy_of_each_class() -> None:
    answers, targets = torch.tensor([0, 1, 1, 2, 0, 1]), torch.tensor([0, 1, 2, 2, 1, 1])
    outputs = torch.nn.functional.one_hot(answers, 3).float()
    found = measured(task("classification", 3), outputs, targets, details=True)
    assert found["confusion"] == [[1, 0, 0], [1, 2, 0], [0, 1, 1]]
    assert found["per_class"] == pytest.approx([1, 2 / 3, 1 / 2])


@pytest.fixture
def labels() -> tuple[torch.Tensor, torch.Tensor]:
    # All logits lie in 0..1, where torchmetrics would take them for probabilities.
    outputs = torch.tensor([[0.9, -0.1, 0.2], [0.1, 0.3, -0.3], [-0.5, 0.8, 0.4], [0.7, 0.6, 0.1]])
    targets = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 1]])
    return outputs, targets


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
def test_multilabel_counts_labels(labels: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> None:
    outputs, targets = labels[0], labels[1].to(dtype)
    made = task("multilabel", 3)
    made.check_targets(targets)
    made.check_outputs(outputs[:2])
    probabilities = torch.sigmoid(outputs.double())
    expected = -(labels[1] * probabilities.log() + (1 - labels[1]) * (1 - probabilities).log()).mean(1)
    torch.testing.assert_close(made.loss(outputs, targets).double(), expected)
    assert made.score(outputs, targets).tolist() == pytest.approx([1, 2 / 3, 1, 2 / 3])
    found = measured(made, outputs, targets)
    # f1 of each label: 2 TP / (2 TP + FP + FN)
    assert found["f1"] == pytest.approx((4 / 5 + 4 / 5 + 6 / 6) / 3)
    assert found["exact_match"] == pytest.approx(2 / 4)
    assert found["map"] == pytest.approx((1 + (1 / 1 + 2 / 3 * 0 + 2 / 3) / 2 + 1) / 3, abs=0.2)
    details = measured(made, outputs, targets, details=True)
    assert details["label_confusion"][0] == [[1, 1], [0, 2]] and details["label_f1"][2] == 1


def test_the_positive_labels_weigh_more_where_asked(labels: tuple[torch.Tensor, torch.Tensor]) -> None:
    outputs, targets = labels
    plain, weighted = (task("multilabel", 3, pos_weight=weight).loss(outputs, targets) for weight in (1.0, 3.0))
    positive = (targets * torch.nn.functional.softplus(-outputs)).mean(1)
    torch.testing.assert_close(weighted, plain + 2 * positive)


@pytest.mark.parametrize(("width", "shape"), [(1, (6,)), (1, (6, 1)), (2, (6, 2))])
def test_regression_metrics_are_those_of_their_definitions(width: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, width, generator=generator) + 1000
    targets = (outputs + torch.randn(6, width, generator=generator)).view(shape)
    made = task("regression", width)
    made.check_targets(targets)
    made.check_outputs(outputs[:2])
    wanted = targets.view(6, width).double()
    error = outputs.double() - wanted
    torch.testing.assert_close(made.loss(outputs, targets).double(), error.square().mean(1))
    torch.testing.assert_close(made.score(outputs, targets).double(), error.abs().mean(1))
    found = measured(made, outputs, targets)
    assert found["mae"] == pytest.approx(float(error.abs().mean()))
    assert found["rmse"] == pytest.approx(math.sqrt(float(error.square().mean())))
    r2 = 1 - error.square().sum(0) / (wanted - wanted.mean(0)).square().sum(0)
    assert found["r2"] == pytest.approx(float(r2.mean()), rel=1e-6), "a large mean costs no digits"


@pytest.mark.parametrize(("name", "expected"), [("l1", 3.0), ("huber", 2.5), ("mse", 9.0)])
def test_the_loss_of_regression_is_chosen(name: str, expected: float) -> None:
    assert task("regression", 1, loss=name).loss(torch.tensor([[4.0]]), torch.tensor([1.0])).tolist() == [expected]


def test_segmentation_leaves_ignored_pixels_out() -> None:
    made = task("segmentation", 3)
    answers = torch.tensor([[[0, 1], [2, 1]], [[0, 0], [1, 1]], [[2, 2], [2, 2]]])
    targets = torch.tensor([[[0, 1], [1, 255]], [[0, 0], [1, 0]], [[255, 255], [255, 255]]], dtype=torch.uint8)
    outputs = torch.nn.functional.one_hot(answers, 3).permute(0, 3, 1, 2).float()
    made.check_targets(targets)
    made.check_outputs(outputs[:2])
    right, wrong = -math.log(math.e / (math.e + 2)), -math.log(1 / (math.e + 2))
    expected = [(2 * right + wrong) / 3, (3 * right + wrong) / 4, 0.0]
    assert made.loss(outputs, targets).tolist() == pytest.approx(expected)
    assert made.score(outputs, targets).tolist() == pytest.approx([2 / 3, 3 / 4, 0])
    found = measured(made, outputs, targets)
    assert found["pixel_accuracy"] == pytest.approx(5 / 7)
    assert found["mean_iou"] == pytest.approx((3 / 4 + 2 / 4 + 0 / 1) / 3)
    assert made.decide(outputs).tolist() == answers.tolist()
    details = measured(made, outputs, targets, details=True)
    assert details["confusion"] == [[3, 1, 0], [0, 2, 1], [0, 0, 0]]


@pytest.mark.parametrize("ignored", [-100, 0])
def test_any_number_can_be_the_ignored_one(ignored: int) -> None:
    targets = torch.tensor([[[0, 1]], [[1, 2]]], dtype=torch.uint8)
    made = task("segmentation", 3, ignore_index=ignored)
    made.check_targets(targets)
    outputs = torch.zeros(2, 3, 1, 2)
    counted = [1, 2] if ignored == 0 else [2, 2]
    assert made.loss(outputs, targets).tolist() == pytest.approx([math.log(3)] * 2)
    assert made.score(outputs, targets).tolist() == pytest.approx([(ignored != 0) / counted[0], 0])


@pytest.mark.parametrize(
    ("name", "width", "targets", "said"),
    [
        ("classification", 3, torch.tensor([0.5]), "takes targets int64 [N], but the data's are float32 [N]"),
        ("classification", 3, torch.zeros(2, 3, dtype=torch.int64), "but the data's are int64 [N, 3]"),
        ("classification", 3, torch.tensor([0, 3]), "must lie in range(3), got 0..3"),
        ("multilabel", 3, torch.zeros(2, 2), "[N, 3] of 0 and 1"),
        ("multilabel", 2, torch.tensor([[0.0, 0.5]]), "must be 0 or 1, got 0.5"),
        ("classification", 3, torch.tensor([[1], [2]]), "but the data's are int64 [N, 1]"),
        ("regression", 1, torch.zeros(2, 1, 1), "takes targets float [N], but the data's are float32 [N, 1, 1]"),
        ("regression", 2, torch.zeros(3), "float [N, 2]"),
        ("regression", 1, torch.tensor([math.nan]), "must be finite"),
        ("segmentation", 3, torch.tensor([1, 2]), "uint8 or int64 [N, H, W]"),
        (
            "segmentation",
            3,
            torch.full((1, 2, 2), 7, dtype=torch.uint8),
            "or be task.args.ignore_index (255), got 7..7",
        ),
    ],
)
def test_targets_of_another_kind_are_refused(name: str, width: int, targets: torch.Tensor, said: str) -> None:
    with pytest.raises(DataError) as caught:
        task(name, width).check_targets(targets)
    assert said in caught.value.message and caught.value.hint


@pytest.mark.parametrize("name", ["classification", "multilabel", "regression", "segmentation"])
def test_heads_of_another_width_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="outputs for 2 (images|samples) have shape"):
        task(name, 3).check_outputs(torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("name", "args", "place"),
    [
        ("multilabel", {"pos_weight": 0}, "task.args.pos_weight"),
        ("regression", {"loss": "mean"}, "task.args.loss"),
        ("segmentation", {"ignore": 3}, "task.args.ignore"),
    ],
)
def test_wrong_arguments_are_refused(name: str, args: dict[str, Any], place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task(name, 2, **args)
    assert caught.value.problems[0].place == place


def shares(world: World) -> list[float]:
    """The agreement of two regressions whose second output is a thousand times wider; rank 2 has no sample."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(9, 2, generator=generator) * torch.tensor([1.0, 1000.0])
    shift = torch.tensor([[0.05, 150.0]]).repeat(9, 1)
    shift[:3, 1] = 0.0
    rows = {1: [slice(None)], 3: [slice(0, 5), slice(5, 9), slice(9, 9)]}[world.world_size][world.rank]

    def decided(values: torch.Tensor) -> Evaluation:
        own = values[rows]
        return Evaluation({}, own if len(own) else torch.empty(0, dtype=torch.int64))

    left, right = decided(outputs + shift), decided(outputs)
    return [agreement(left, right, task("regression", 2, tolerance=each), world) for each in (0.1, 0.5, 1e-3)]


def test_regressions_agree_within_a_share_of_each_outputs_spread() -> None:
    # The first output is always off by a twentieth of its spread; the second by about a seventh, but for three samples.
    assert shares(World()) == pytest.approx([(9 + 3) / 18, 1.0, 3 / 18])


@pytest.mark.slow
def test_the_spread_is_that_of_all_ranks_samples() -> None:
    assert call(3, "tests.tasks.test_task_metrics:shares") == [pytest.approx(shares(World()))] * 3
