"""Object detection: the losses, detections and metrics of SSD, RetinaNet and FCOS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.ops import box_iou

from dist_train.config.base import Settings
from dist_train.errors import DataError, ModelError
from dist_train.tasks import detection_losses
from dist_train.tasks.average_precision import AveragePrecision
from dist_train.tasks.base import Metrics, Task, task_args
from dist_train.tasks.detection_losses import Matched
from dist_train.tasks.detector import Detector, Found, Outputs, detections
from dist_train.tasks.marks import mark
from dist_train.trees import Tree, named_leaves, plain

_PARTS = 16  # of a pixel, in decisions
_SHARES = 10_000  # of a score, in decisions
_LEAST = 0.5  # of the score that a box needs in the other model
_SAME = 0.5  # IoU of boxes that are taken for one


class _Args(Settings):
    score: float = Field(0.3, gt=0, le=1)
    """Least score of the boxes on which two models must agree, and of those that are shown."""
    most: int = Field(100, ge=1, le=1000)
    """Most boxes of an image among the decisions: those of the highest scores."""


class Detection(Task):
    """Object detection with a model whose attribute `detector` describes its outputs (models/detection.py).

    Outputs: see `Outputs`. Targets: {"boxes": float32 [B, M, 5], the class from 0 and x1, y1, x2, y2 in pixels of the
    input; "mask": bool [B, M], True where a row is a box}. The loss is the one of the model's kind in torchvision, over
    the global batch: a step in which no anchor has a box trains nothing. Metrics: `map` and `map50`, by COCO's rules.

    Two models agree on an image by the share of their boxes of `score` or more that the other has too: of the same
    class, with an IoU of 0.5 or more, and at least half that score.
    """

    headline = "map"
    score_name = "anchor acc"
    targets_follow_pixels = True

    def __init__(self, num_classes: int, args: dict[str, Any]) -> None:
        self._num_classes = num_classes
        self._args = task_args("detection", _Args, args)
        self._detector: Detector | None = None
        self._anchors = torch.empty(0, 4)
        self._last: tuple[Tensor, Matched] | None = None  # of the batch whose loss was asked for last

    def for_model(self, model: nn.Module, inputs: Tree) -> None:
        describe = getattr(model, "detector", None)
        if not callable(describe) or not isinstance(inputs, Tensor) or inputs.dim() != 4:
            raise ModelError(
                f"the task detection takes models that describe their anchors, and {type(model).__name__} has no "
                "method detector(images)",
                "--model.name small_ssd, ssdlite320_mobilenet_v3_large, retinanet_resnet50_fpn or fcos_resnet50_fpn",
            )
        self._detector = describe(inputs)
        self._anchors = self.detector.anchors().to(inputs.device)

    def described(self) -> dict[str, Any]:
        """Returns the manifest's `detector`, for `Detector.of_json`, and `shown_score`, the least of boxes shown."""
        return {"detector": self.detector.as_json(), "shown_score": self._args.score}

    @property
    def detector(self) -> Detector:
        """The description of the model's outputs."""
        assert self._detector is not None, "for_model was not called"
        return self._detector

    def _anchors_on(self, device: torch.device) -> Tensor:
        if self._anchors.device != device:
            self._anchors = self._anchors.to(device)
        return self._anchors

    def check_outputs(self, outputs: Outputs) -> None:
        named = dict(named_leaves(plain(outputs)))
        anchors, columns = len(self._anchors), self._num_classes + 1
        wanted = {"cls_logits": [2, anchors, columns], "bbox_regression": [2, anchors, 4]}
        if self.detector.kind == "fcos":
            wanted["bbox_ctrness"] = [2, anchors, 1]
        found = {name: list(leaf.shape) for name, leaf in named.items()}
        if found != wanted:
            raise DataError(
                f"the model's outputs for 2 images are {found}, but {self.detector.kind} with {anchors} anchors and "
                f"{self._num_classes} classes gives {wanted}",
                "give its head num_classes + 1 columns: the first is the background's",
            )

    def check_targets(self, targets: Tree) -> None:
        found = dict(named_leaves(targets)) if isinstance(targets, Mapping) else {}
        if set(found) != {"boxes", "mask"}:
            raise DataError(
                "detection takes targets {boxes, mask}, and the data's are "
                f"{', '.join(name for name, _ in named_leaves(targets, 'targets'))}",
                "give boxes, float [M, 5] (class, x1, y1, x2, y2), and mask, bool [M], False for rows that pad",
            )
        boxes, mask = found["boxes"], found["mask"]
        if boxes.dim() != 3 or boxes.shape[2] != 5 or tuple(mask.shape) != tuple(boxes.shape[:2]):
            raise DataError(
                f"boxes must be float [N, M, 5] and mask bool [N, M], got {list(boxes.shape)} and {list(mask.shape)}",
                "a row of boxes is class, x1, y1, x2, y2, in pixels of the input",
            )
        real = boxes[mask.bool()]
        if not bool(torch.isfinite(real).all()):
            raise DataError("a box has a number that is NaN or infinite", "leave it out")
        classes = real[:, 0]
        wrong = real[(classes != classes.round()) | (classes < 0) | (classes >= self._num_classes)]
        if len(wrong):
            raise DataError(
                f"the class of a box must lie in range({self._num_classes}), got {float(wrong[0, 0]):g}",
                "count classes from 0; the background is none of them",
            )
        flat = real[(real[:, 3] <= real[:, 1]) | (real[:, 4] <= real[:, 2])]
        if len(flat):
            raise DataError(
                f"a box has no area: x1, y1, x2, y2 are {', '.join(f'{each:g}' for each in flat[0, 1:].tolist())}",
                "give corners with x1 < x2 and y1 < y2, not a width and a height; leave empty boxes out",
            )
        if self._detector is not None:  # not yet for the items that are tried before the model
            tall, wide = self._detector.size
            outside = (real[:, 1:3] >= real.new_tensor([wide, tall])).any(1) | (real[:, 3:] <= 0).any(1)
            if bool(outside.any()):
                corners = ", ".join(f"{each:g}" for each in real[outside][0, 1:].tolist())
                raise DataError(
                    f"a box lies outside its image of {wide} x {tall} pixels: x1, y1, x2, y2 are {corners}",
                    "give boxes in pixels of the input: where an image is scaled, its boxes are scaled with it",
                )

    def _matched(self, targets: Mapping[str, Tensor], device: torch.device) -> Matched:
        boxes = targets["boxes"]
        if self._last is None or self._last[0] is not boxes:
            mask = targets["mask"].to(device).bool()
            made = detection_losses.match(boxes.to(device).float(), mask, self._anchors_on(device), self.detector)
            self._last = boxes, made
        return self._last[1]

    def summed_loss(self, outputs: Outputs, targets: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        device = outputs["cls_logits"].device
        matched = self._matched(targets, device)
        return detection_losses.summed_loss(outputs, matched, self._anchors_on(device), self.detector)

    def sample_losses(self, outputs: Outputs, targets: Mapping[str, Tensor]) -> Tensor:
        """Each image's loss, divided by its own matched anchors."""
        device = outputs["cls_logits"].device
        matched = self._matched(targets, device)
        losses = detection_losses.image_losses(outputs, matched, self._anchors_on(device), self.detector)
        return losses / matched.inside.sum(1).clamp(min=1)

    def draw(self, image: Any, scale: float, targets: Mapping[str, Tensor], decision: Tensor) -> None:
        """Draws the true boxes in white, and those found in their classes' colours."""
        true = targets["boxes"][targets["mask"].bool()].tolist()
        mark(image, [(int(label), [each * scale for each in corners], "") for label, *corners in true], "white")
        found = shown_boxes(decision, self._args.score)
        mark(image, [(label, [each * scale for each in corners], "") for label, _, corners in found])

    def score(self, outputs: Outputs, targets: Mapping[str, Tensor]) -> Tensor:
        """Share of each image's matched anchors whose class is the likeliest; 1 where none is matched."""
        logits = outputs["cls_logits"]
        matched = self._matched(targets, logits.device)
        right = ((logits.argmax(2) == matched.columns) & matched.inside).sum(1)
        count = matched.inside.sum(1)
        return torch.where(count > 0, right / count.clamp(min=1), 1.0)

    def found(self, outputs: Outputs) -> list[Found]:
        """Returns the detections of each image."""
        return detections(outputs, self.detector, self._anchors_on(outputs["cls_logits"].device))

    def decide(self, outputs: Outputs) -> Tensor:
        """The most certain boxes, int32 [B, most, 6]: class, score in 1/10,000, corners in 1/16 pixel; class -1: none.

        Boxes that have half the `score` are among them: the other model may be a little less sure of them.
        """
        found = self.found(outputs)
        made = outputs["cls_logits"].new_full((len(found), self._args.most, 6), -1, dtype=torch.int32)
        for row, image in zip(made, found, strict=True):
            likely = (image.scores >= self._args.score * _LEAST).nonzero().flatten()[: self._args.most]
            row[: len(likely), 0] = image.classes[likely].int()
            row[: len(likely), 1] = (image.scores[likely] * _SHARES).round().int()
            row[: len(likely), 2:] = (image.boxes[likely] * _PARTS).round().int()
        return made

    def agree(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.tensor([self._shared(*pair) for pair in zip(left, right, strict=True)])

    def _shared(self, left: Tensor, right: Tensor) -> float:
        """Returns the share of the boxes of two models, for one image, that the other has too; 1 for no boxes."""
        sure = [each[:, 1] >= self._args.score * _SHARES for each in (left, right)]
        count = int(sure[0].sum() + sure[1].sum())
        if not count:
            return 1.0
        overlap = box_iou(left[:, 2:].float(), right[:, 2:].float())
        same = (overlap >= _SAME) & (left[:, None, 0] == right[None, :, 0])
        same &= (left[:, None, 0] >= 0) & (right[None, :, 0] >= 0)
        return int((same.any(1) & sure[0]).sum() + (same.any(0) & sure[1]).sum()) / count

    def metrics(self) -> Metrics:
        return AveragePrecision(self._num_classes, self.found)


def shown_boxes(decisions: Tensor, least: float) -> list[tuple[int, float, tuple[float, ...]]]:
    """Returns class, score and corners in pixels of one image's decisions [most, 6] of a score of `least` or more."""
    return [
        (label, score / _SHARES, tuple(corner / _PARTS for corner in corners))
        for label, score, *corners in decisions.tolist()
        if label >= 0 and score >= least * _SHARES
    ]
