"""Token classification: a class for each token of a text."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field

from dist_train.config.base import Count, Settings
from dist_train.errors import DataError
from dist_train.tasks.base import Metrics, Task, one_output, require_classes, require_tensor, task_args, wrong_targets
from dist_train.tasks.counter import Counts
from dist_train.tasks.counts import Accuracy, ClassIoU, MeanIoU, confusion
from dist_train.trees import Tree

_MOST_CLASSES = 255  # of decisions in a byte; 0 stands for no token


class _Args(Settings):
    ignore_index: Annotated[int, Field(ge=-(2**31), lt=2**31)] = -100
    """Target of tokens that count neither in the loss nor in the metrics: padding, and all but a word's first."""
    max_length: Count = 512
    """Most tokens of a text."""


class Tokens(Task):
    """Token classification: outputs float [B, classes, S], targets int64 [B, S]; S may vary from batch to batch.

    A sample's loss is the mean cross-entropy over its counted tokens (0 where it has none). Metrics: `token_accuracy`,
    and `mean_iou` over the classes that occur.
    """

    headline = "token_accuracy"
    score_name = "token acc"

    def __init__(self, num_classes: int, args: dict[str, Any]) -> None:
        self._num_classes = num_classes
        found = task_args("tokens", _Args, args)
        self._ignore_index, self._max_length = found.ignore_index, found.max_length

    def pick(self, outputs: Tree) -> torch.Tensor:
        return one_output(outputs, "tokens")

    def check_outputs(self, outputs: torch.Tensor) -> None:
        if outputs.dim() != 3 or outputs.shape[:2] != (2, self._num_classes):
            raise DataError(
                f"the model's outputs for 2 texts have shape {list(outputs.shape)}, "
                f"but tokens of {self._num_classes} classes take [2, {self._num_classes}, S]",
                "--model.args.head token for a model hf/...; in others logits [B, S, classes].transpose(1, 2)",
            )
        if outputs.shape[2] > self._max_length:
            message = f"texts have {outputs.shape[2]} tokens, and task.args.max_length is {self._max_length}"
            raise DataError(message, f"--task.args.max_length {outputs.shape[2]}, or as many as the longest text has")

    def check_targets(self, targets: Tree) -> None:
        require_tensor(targets, "tokens")
        if targets.is_floating_point() or targets.dim() != 2:
            raise wrong_targets("tokens", "int64 [N, S]", targets)
        require_classes(targets, self._num_classes, self._ignore_index)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(outputs, targets.long(), reduction="none", ignore_index=self._ignore_index)
        return losses.sum(1) / self._counted(targets)

    def score(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        right = (outputs.argmax(1) == targets) & (targets != self._ignore_index)
        return right.sum(1) / self._counted(targets)

    def _counted(self, targets: torch.Tensor) -> torch.Tensor:
        return (targets != self._ignore_index).sum(1).clamp(min=1)

    def decide(self, outputs: torch.Tensor) -> torch.Tensor:
        """Class plus 1 of each token, [B, max_length]; 0 where the batch has no token."""
        answer = outputs.argmax(1) + 1
        if self._num_classes <= _MOST_CLASSES:
            answer = answer.to(torch.uint8)
        if answer.shape[1] > self._max_length:
            message = f"a text has {answer.shape[1]} tokens, and task.args.max_length is {self._max_length}"
            raise DataError(message, f"--task.args.max_length {answer.shape[1]}, or more")
        return F.pad(answer, (0, self._max_length - answer.shape[1]))

    def agree(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        there = left > 0
        return ((left == right) & there).sum(1) / there.sum(1).clamp(min=1)

    def metrics(self) -> Metrics:
        shape = (self._num_classes, self._ignore_index)
        return Counts({"token_accuracy": Accuracy(*shape), "mean_iou": MeanIoU(*shape)})

    def details(self) -> Metrics:
        """Makes `confusion` of tokens, int64 [classes, classes], rows are true classes, and `per_class`, IoUs."""
        shape = (self._num_classes, self._ignore_index)
        return Counts({**confusion(*shape), "per_class": ClassIoU(*shape)})
