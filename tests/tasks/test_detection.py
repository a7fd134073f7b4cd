"""Detection: anchors, losses and detections are torchvision's; agreement and average precision by hand."""

from __future__ import annotations

import base64
import io
import json
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dist_train.data.arrays import Batch
from dist_train.distributed.world import World
from dist_train.errors import DataError, ModelError
from dist_train.lowering.boxes import boxes_onnx
from dist_train.models.detection import small_ssd
from dist_train.models.small import small_resnet
from dist_train.tasks.average_precision import OVERLAPS, AveragePrecision
from dist_train.tasks.detection import Detection, shown_boxes
from dist_train.tasks.detector import BoxesOfImage, Detector, Found, detections
from dist_train.training.evaluation_details import Details
from dist_train.trees import take
from tests.support.boxes import CLASSES, SIZE, its_anchors, its_detections, its_loss, targets, torchvisions

KINDS = [
    "ssdlite320_mobilenet_v3_large",
    pytest.param("retinanet_resnet50_fpn", marks=pytest.mark.slow),
    pytest.param("fcos_resnet50_fpn", marks=pytest.mark.slow),
]


def noisy(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns outputs as of a model that is sure of some boxes, with gradients."""
    generator = torch.Generator().manual_seed(1)
    found = {name: each + torch.randn(each.shape, generator=generator) for name, each in outputs.items()}
    if "bbox_ctrness" in found:  # distances are above 0
        found["bbox_regression"] = found["bbox_regression"].abs()
    return {name: each.detach().requires_grad_() for name, each in found.items()}


@pytest.mark.parametrize("name", KINDS)
def test_anchors_losses_gradients_and_detections_are_torchvisions(name: str) -> None:
    model, dense = torchvisions(name)
    images = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    task = Detection(CLASSES, {})
    task.for_model(dense, images)
    detector = task.detector
    theirs = its_anchors(model, dense, images)
    torch.testing.assert_close(detector.anchors(), theirs[0])
    assert len(detector.anchors()) == sum(detector.sizes)
    task._anchors = theirs[0]  # equal but for rounding, by which a tie between anchors may be decided otherwise
    with torch.no_grad():
        outputs = noisy(dense(images))
    task.check_outputs(take(outputs, slice(2)))
    made = targets(3, empty=(1,))
    total, count = task.summed_loss(outputs, made)
    own = torch.autograd.grad(total / count, list(outputs.values()))
    expected = its_loss(model, outputs, theirs, detector.sizes, made)
    torch.testing.assert_close(total / count, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(own, torch.autograd.grad(expected, list(outputs.values())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    for one, other in zip(
        detections(outputs, detector, theirs[0]), its_detections(model, outputs, theirs, detector.sizes), strict=True
    ):
        real = other["labels"] > 0  # of the sigmoids torchvision also reads the background's column
        if detector.kind == "ssd":
            torch.testing.assert_close(one.boxes, other["boxes"], rtol=1e-4, atol=1e-3)
            assert one.classes.tolist() == (other["labels"] - 1).tolist()
            torch.testing.assert_close(one.scores, other["scores"])
        else:
            shown = min(20, int(real.sum()))
            torch.testing.assert_close(one.scores[:shown], other["scores"][real][:shown])
            assert one.classes[:shown].tolist() == (other["labels"][real][:shown] - 1).tolist()


@pytest.mark.parametrize("name", KINDS)
def test_boxes_of_fixed_shape_are_the_detections_and_go_to_onnx(name: str) -> None:
    _, dense = torchvisions(name)
    images = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    task = Detection(CLASSES, {})
    task.for_model(dense, images)
    with torch.no_grad():
        outputs = {name: each.detach() for name, each in noisy(dense(images)).items()}
        boxes, scores, labels = BoxesOfImage(task.detector)(**outputs)
    (found,) = detections(outputs, task.detector)
    real = int((scores > 0).sum())
    assert real == len(found.scores) > 5 and bool((labels[real:] == -1).all())
    assert torch.equal(labels[:real], found.classes)
    torch.testing.assert_close(scores[:real], found.scores)
    torch.testing.assert_close(boxes[:real], found.boxes)
    pytest.importorskip("onnxruntime")
    assert boxes_onnx(task.detector, outputs)  # which compares ONNX Runtime's answers


def small(images: int = 3) -> tuple[Detection, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = small_ssd(CLASSES, 3, width=4).eval(), torch.randn(images, 3, SIZE, SIZE)
    task = Detection(CLASSES, {})
    task.for_model(model, inputs)
    with torch.no_grad():
        return task, noisy(model(inputs)), targets(images)


@pytest.mark.parametrize("cut", [1, 2])
def test_a_batchs_sums_and_counts_are_those_of_its_parts(cut: int) -> None:
    task, outputs, made = small()
    whole = task.summed_loss(outputs, made)
    parts = [task.summed_loss(take(outputs, rows), take(made, rows)) for rows in (slice(cut), slice(cut, None))]
    for place in (0, 1):
        torch.testing.assert_close(whole[place], parts[0][place] + parts[1][place])


def test_padding_and_an_empty_image_do_not_count() -> None:
    task, outputs, made = small(2)
    total, count = task.summed_loss(outputs, made)
    moved = {"boxes": made["boxes"].clone(), "mask": made["mask"]}
    moved["boxes"][~made["mask"]] = 7.0
    assert torch.equal(task.summed_loss(outputs, moved)[0], total)
    for most in (5, 0):  # 0: a batch of images without boxes, which a collate pads to its longest
        nothing = {"boxes": torch.zeros(2, most, 5), "mask": torch.zeros(2, most, dtype=torch.bool)}
        total, count = task.summed_loss(outputs, nothing)
        assert total.item() == count.item() == 0.0
        assert task.score(outputs, nothing).tolist() == [1.0, 1.0]


def test_the_description_comes_back_from_json() -> None:
    task, outputs, _ = small(1)
    detector = Detector.of_json(json.loads(json.dumps(task.described()["detector"])))
    assert detector == task.detector
    assert torch.equal(detections(outputs, detector)[0].boxes, task.found(outputs)[0].boxes)


def decided(*rows: tuple[float, ...]) -> Tensor:
    """Returns decisions of one image for boxes (class, score, x1, y1, x2, y2)."""
    scale = torch.tensor([1, 10_000, 16, 16, 16, 16])
    made = torch.full((1, 4, 6), -1, dtype=torch.int32)
    for place, row in enumerate(rows):
        made[0, place] = (torch.tensor(row) * scale).round().int()
    return made


@pytest.mark.parametrize(
    ("left", "right", "share"),
    [
        ([], [], 1.0),
        ([(0, 0.9, 0, 0, 10, 10)], [], 0.0),
        ([(0, 0.9, 0, 0, 10, 10)], [(0, 0.8, 0, 0, 10, 12)], 1.0),
        ([(0, 0.9, 0, 0, 10, 10)], [(1, 0.8, 0, 0, 10, 10)], 0.0),
        ([(0, 0.9, 0, 0, 10, 10)], [(0, 0.8, 0, 0, 10, 21)], 0.0),  # IoU below 0.5
        ([(0, 0.31, 0, 0, 10, 10)], [(0, 0.29, 0, 0, 10, 10)], 1.0),  # one is just below the score
        ([(0, 0.2, 0, 0, 10, 10)], [], 1.0),  # no model is sure of it
        ([(0, 0.9, 0, 0, 10, 10), (1, 0.9, 30, 30, 40, 40)], [(0, 0.8, 0, 0, 10, 10)], 2 / 3),
    ],
)
def test_models_agree_by_the_share_of_boxes_that_both_have(left: Any, right: Any, share: float) -> None:
    task = Detection(2, {})
    assert float(task.agree(decided(*left), decided(*right))) == pytest.approx(share)
    assert float(task.agree(decided(*right), decided(*left))) == pytest.approx(share)


def test_decisions_hold_what_is_shown() -> None:
    task, outputs, _ = small(1)
    found, decisions = task.found(outputs)[0], task.decide(outputs)[0]
    shown = shown_boxes(decisions, 0.3)
    assert len(shown) == int((found.scores >= 0.3).sum()) > 0
    label, score, corners = shown[0]
    assert label == int(found.classes[0]) and score == pytest.approx(float(found.scores[0]), abs=1e-4)
    assert corners == pytest.approx(found.boxes[0].tolist(), abs=1 / 16)
    assert float(task.agree(decisions[None], decisions[None])) == 1.0


def precision(found: list[Found], boxes: Tensor, mask: Tensor, cut: int = 1) -> dict[str, float]:
    metric = AveragePrecision(2, lambda outputs: [found[int(place)] for place in outputs["places"]])
    for rows in (slice(cut), slice(cut, None)):
        places = torch.arange(len(found))[rows]
        metric.update({"places": places}, {"boxes": boxes[rows], "mask": mask[rows]})
    return {name: float(value) for name, value in metric.compute().items()}


def test_average_precision_by_hand() -> None:
    box = torch.tensor([[10.0, 10.0, 20.0, 20.0]])
    boxes = torch.tensor([[[0.0, 10, 10, 20, 20], [0, 0, 0, 0, 0]], [[0.0, 10, 10, 20, 20], [0, 40, 40, 50, 50]]])
    mask = torch.tensor([[True, False], [True, True]])
    far = torch.tensor([[60.0, 60.0, 70.0, 70.0]])
    zero = torch.zeros(1, dtype=torch.int64)
    exact = Found(box, torch.tensor([0.9]), zero)
    assert precision([exact, exact], boxes, mask) == pytest.approx({"map": 67 / 101, "map50": 67 / 101})
    wrong = Found(torch.cat([box, far]), torch.tensor([0.9, 0.95]), torch.zeros(2, dtype=torch.int64))
    # The most certain one is wrong: precision 1/2, then 2/3 up to a recall of 2/3.
    assert precision([wrong, exact], boxes, mask)["map50"] == pytest.approx(67 / 101 * 2 / 3)
    # An IoU of 0.7 is right at 0.5 to 0.7 only, and a second box for the same object is wrong.
    near = Found(torch.tensor([[10.0, 10, 20, 17], [10, 10, 20, 20]]), torch.tensor([0.9, 0.8]), zero.repeat(2))
    one = precision([near], boxes[:1], mask[:1])
    assert one["map50"] == 1.0
    assert one["map"] == pytest.approx((5 + 5 * 0.5) / len(OVERLAPS))


def test_average_precision_does_not_depend_on_the_order_of_images_and_leaves_out_absent_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    made = targets(12, seed=3)
    made["boxes"][..., 0] = 0
    found = []
    for rows, real in zip(made["boxes"], made["mask"], strict=True):
        true = rows[real][:, 1:]
        boxes = true + torch.randn(true.shape, generator=generator) * 3
        scores = (torch.rand(len(true), generator=generator) * 4).ceil() / 4  # many ties
        order = scores.sort(descending=True).indices
        found.append(Found(boxes[order], scores[order], torch.zeros(len(true), dtype=torch.int64)))
    first = precision(found, made["boxes"], made["mask"], cut=4)
    turned = precision(found[::-1], made["boxes"].flip(0), made["mask"].flip(0), cut=7)
    assert first == turned and 0 < first["map"] < first["map50"] <= 1


def test_nothing_to_find_and_nothing_found_give_0() -> None:
    none = Found(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    boxes = torch.tensor([[[0.0, 1, 1, 9, 9]]])
    assert precision([none], boxes, torch.tensor([[True]])) == {"map": 0.0, "map50": 0.0}
    assert precision([none], boxes, torch.tensor([[False]])) == {"map": 0.0, "map50": 0.0}, "results.json holds no NaN"
    assert precision([none], boxes, torch.tensor([[1]])) == precision([none], boxes, torch.tensor([[True]]))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[3.0, 1, 1, 9, 9]], "must lie in range(3), got 3"),
        ([[0.5, 1, 1, 9, 9]], "must lie in range(3), got 0.5"),
        ([[0.0, 9, 1, 9, 9]], "has no area: x1, y1, x2, y2 are 9, 1, 9, 9"),
        ([[0.0, float("nan"), 1, 9, 9]], "NaN or infinite"),
    ],
)
def test_a_wrong_box_is_named(rows: list[list[float]], said: str) -> None:
    with pytest.raises(DataError) as caught:
        Detection(3, {}).check_targets({"boxes": torch.tensor([rows]), "mask": torch.ones(1, 1, dtype=torch.bool)})
    assert said in caught.value.message
    Detection(3, {}).check_targets({"boxes": torch.tensor([rows]), "mask": torch.zeros(1, 1, dtype=torch.bool)})


@pytest.mark.parametrize(
    "given", [torch.zeros(2), {"boxes": torch.zeros(2, 3, 5)}, {"a": torch.zeros(2), "b": torch.zeros(2)}]
)
def test_targets_of_another_kind_are_refused(given: Any) -> None:
    with pytest.raises(DataError, match="detection takes targets {boxes, mask}"):
        Detection(3, {}).check_targets(given)


@pytest.mark.parametrize("corners", [[SIZE, 1, 140, 9], [-9.0, 1, 0, 9], [1.0, 500, 9, 600]])
def test_a_box_outside_its_image_is_named(corners: list[float]) -> None:
    task = small()[0]
    assert task.detector.size == (SIZE, SIZE)
    inside = {"boxes": torch.tensor([[[0.0, -9, 1, 140, 9]]]), "mask": torch.tensor([[True]])}
    task.check_targets(inside)  # that reaches beyond is cut there
    with pytest.raises(DataError, match=f"a box lies outside its image of {SIZE} x {SIZE} pixels"):
        task.check_targets({**inside, "boxes": torch.tensor([[[0.0, *corners]]])})


def test_a_model_without_anchors_is_refused() -> None:
    with pytest.raises(ModelError, match="SmallResNet has no method"):
        Detection(3, {}).for_model(small_resnet(3, 3), torch.zeros(2, 3, 32, 32))


def test_outputs_of_another_width_are_refused() -> None:
    task, outputs, _ = small(2)
    with pytest.raises(DataError, match="the first is the background's"):
        Detection.check_outputs(task, {**outputs, "cls_logits": outputs["cls_logits"][..., 1:]})


def test_a_report_shows_the_worst_images_with_their_boxes() -> None:
    task, outputs, made = small()
    metrics = Details(task, torch.device("cpu"))
    losses = task.sample_losses(outputs, made)
    assert losses.shape == (3,)
    black = torch.zeros(3, 3, SIZE, SIZE)
    metrics.update(Batch(torch.arange(3), black, made), outputs, losses.detach(), task.decide(outputs))
    shown = metrics.gather(World(), (0.0,) * 3, (1.0,) * 3)["worst"]
    assert [each["id"] for each in shown] == losses.argsort(descending=True).tolist()
    for each in shown:
        with Image.open(io.BytesIO(base64.b64decode(each["image"]))) as image:
            left, top = made["boxes"][each["id"]][made["mask"][each["id"]]][0, 1:3].tolist()
            assert image.mode == "RGB" and image.size == (SIZE, SIZE)
            colours = {colour for _, colour in image.getcolors() or []}
            assert (255, 255, 255) in colours and 0 <= left < SIZE and 0 <= top < SIZE


@pytest.mark.long
@pytest.mark.skipif(find_spec("pycocotools") is None, reason="only with pycocotools, which torchmetrics needs")
@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_that_of_torchmetrics_and_pycocotools(seed: int) -> None:
    from torchmetrics.detection import MeanAveragePrecision

    generator = torch.Generator().manual_seed(seed)
    made = targets(40, seed=seed)
    made["boxes"][..., 0] = made["boxes"][..., 0].clamp(max=1)
    theirs = MeanAveragePrecision(iou_type="bbox", rec_thresholds=np.linspace(0, 1, 101).tolist())
    found = []
    for rows, real in zip(made["boxes"], made["mask"], strict=True):
        true = rows[real].repeat(2, 1)
        # Less than half of the least side: boxes without an area do not count there.
        boxes = true[:, 1:] + torch.rand(len(true), 4, generator=generator) * 5 - 2.5
        scores = torch.rand(len(true), generator=generator)
        classes = torch.where(torch.rand(len(true), generator=generator) < 0.8, true[:, 0], 1 - true[:, 0]).long()
        order = scores.sort(descending=True).indices
        found.append(Found(boxes[order], scores[order], classes[order]))
        wanted = {"boxes": rows[real][:, 1:], "labels": rows[real][:, 0].long()}
        theirs.update([{"boxes": boxes, "scores": scores, "labels": classes}], [wanted])
    own, expected = precision(found, made["boxes"], made["mask"], cut=13), theirs.compute()
    assert own["map"] == pytest.approx(float(expected["map"]), abs=1e-5)
    assert own["map50"] == pytest.approx(float(expected["map_50"]), abs=1e-5)
