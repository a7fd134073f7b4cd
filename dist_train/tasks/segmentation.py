"""Semantic segmentation: a class for each pixel."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field

from dist_train.config.base import Settings
from dist_train.errors import DataError
from dist_train.tasks.base import Metrics, Task, one_output, require_classes, require_tensor, task_args, wrong_targets
from dist_train.tasks.counter import Counts
from dist_train.tasks.counts import Accuracy, ClassIoU, MeanIoU, confusion
from dist_train.trees import Tree


class _Args(Settings):
    ignore_index: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 255
    """Target of pixels that count neither in the loss nor in the metrics."""


class Segmentation(Task):
    """Semantic segmentation: outputs float [B, classes, H, W], targets uint8 or int64 [B, H, W].

    A sample's loss is the mean cross-entropy over its counted pixels (0 where it has none). Metrics: `mean_iou`, over
    the classes that occur, and `pixel_accuracy`.
    """

    headline = "mean_iou"
    score_name = "pixel acc"

    def __init__(self, num_classes: int, args: dict[str, Any]) -> None:
        self._num_classes = num_classes
        self._ignore_index = task_args("segmentation", _Args, args).ignore_index

    def pick(self, outputs: Tree) -> torch.Tensor:
        return one_output(outputs, "segmentation")

    def check_outputs(self, outputs: torch.Tensor) -> None:
        if outputs.dim() != 4 or outputs.shape[:2] != (2, self._num_classes):
            raise DataError(
                f"the model's outputs for 2 images have shape {list(outputs.shape)}, "
                f"but segmentation into {self._num_classes} classes takes [2, {self._num_classes}, H, W]",
                "--model.name small_fcn, or fcn_resnet50 for RGB images",
            )

    def check_targets(self, targets: Tree) -> None:
        require_tensor(targets, "segmentation")
        if targets.is_floating_point() or targets.dim() != 3:
            raise wrong_targets("segmentation", "uint8 or int64 [N, H, W]", targets)
        if targets.dtype != torch.uint8 or 0 <= self._ignore_index <= 255:
            require_classes(targets, self._num_classes, self._ignore_index)
        else:
            require_classes(targets, self._num_classes)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(outputs, targets.long(), reduction="none", ignore_index=self._ignore_index)
        return losses.flatten(1).sum(1) / self._counted(targets)

    def score(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        right = (outputs.argmax(1) == targets) & (targets.long() != self._ignore_index)
        return right.flatten(1).sum(1) / self._counted(targets)

    def _counted(self, targets: torch.Tensor) -> torch.Tensor:
        return (targets.long() != self._ignore_index).flatten(1).sum(1).clamp(min=1)

    def decide(self, outputs: torch.Tensor) -> torch.Tensor:
        answer = outputs.argmax(1)
        # The decisions for a whole evaluation set stay in memory until they are compared.
        return answer.to(torch.uint8) if self._num_classes <= 256 else answer

    def metrics(self) -> Metrics:
        shape = (self._num_classes, self._ignore_index)
        return Counts({"mean_iou": MeanIoU(*shape), "pixel_accuracy": Accuracy(*shape)})

    def details(self) -> Metrics:
        """Makes `confusion` of pixels, int64 [classes, classes], rows are true classes, and `per_class`, IoUs.

        Above `DENSE_CLASSES` classes, the results of `ConfusedPairs` stand in place of `confusion`.
        """
        shape = (self._num_classes, self._ignore_index)
        return Counts({**confusion(*shape), "per_class": ClassIoU(*shape)})
