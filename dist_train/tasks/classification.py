"""Single-label classification."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from dist_train.config.base import Settings
from dist_train.errors import DataError
from dist_train.tasks.base import Metrics, Task, one_output, require_classes, require_tensor, task_args, wrong_targets
from dist_train.tasks.counter import Counter, Counts
from dist_train.tasks.counts import Accuracy, ClassAccuracy, TopK, confusion
from dist_train.trees import Tree


class _Args(Settings):
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: list[Annotated[float, Field(ge=0, le=1e6)]] | Literal["balanced"] | None = None
    """Factors of the classes' losses. balanced: inverse to their shares of the training rows; their mean there is 1."""
    focal_gamma: float = Field(0.0, ge=0, le=100)
    """Focal loss (Lin et al. 2017, arXiv:1708.02002): each loss times (1 - p) ** gamma, p of the true class."""


class Classification(Task):
    """Single-label classification: outputs float [B, classes], targets [B] of any integer type."""

    headline = "top1"

    def __init__(self, num_classes: int, args: dict[str, Any]) -> None:
        self._num_classes = num_classes
        given = task_args("classification", _Args, args)
        self._label_smoothing, self._gamma = given.label_smoothing, given.focal_gamma
        self.wants_classes = given.class_weights == "balanced"
        self._weights = torch.tensor(given.class_weights) if isinstance(given.class_weights, list) else None

    def learn_classes(self, classes: torch.Tensor) -> None:
        """Takes the classes of all training rows, int64 [N], from which `class_weights: balanced` follow.

        Raises:
            DataError: a class has no row.
        """
        counts = torch.bincount(classes, minlength=self._num_classes)
        if not counts.all():
            missing = ", ".join(map(str, (counts == 0).nonzero().flatten().tolist()[:5]))
            raise DataError(
                f"task.args.class_weights: balanced, but no training row is of class {missing}",
                "give the weights: --task.args.class_weights '[1, 1, ...]'",
            )
        self._weights = (len(classes) / (self._num_classes * counts.double())).float()

    def pick(self, outputs: Tree) -> torch.Tensor:
        return one_output(outputs, "classification")

    def check_outputs(self, outputs: torch.Tensor) -> None:
        if self._weights is not None and len(self._weights) != self._num_classes:
            raise DataError(
                f"task.args.class_weights has {len(self._weights)} numbers, the data has {self._num_classes} classes",
                "give a number for each class, or balanced",
            )
        if outputs.shape != (2, self._num_classes):
            raise DataError(
                f"the model's outputs for 2 samples have shape {list(outputs.shape)}, "
                f"but the data has {self._num_classes} classes",
                "give the model a head of num_classes outputs; model.args must not set another number",
            )

    def check_targets(self, targets: Tree) -> None:
        require_tensor(targets, "classification")
        if targets.is_floating_point() or targets.dim() != 1:
            hint = "return int(target) from the dataset, an index of a class" if targets[0].numel() == 1 else None
            raise wrong_targets("classification", "int64 [N]", targets, hint)
        require_classes(targets, self._num_classes)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        targets = targets.long()
        if self._weights is not None and self._weights.device != outputs.device:
            self._weights = self._weights.to(outputs.device)
        # torch's mean would divide by the weights' sum of a rank's rows. Here it is one of all ranks, over the rows.
        losses = F.cross_entropy(
            outputs, targets, self._weights, reduction="none", label_smoothing=self._label_smoothing
        )
        if not self._gamma:
            return losses
        known = F.log_softmax(outputs, 1).gather(1, targets[:, None])[:, 0]
        return losses * (1 - known.exp()).clamp(min=0) ** self._gamma

    def score(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.argmax(1) == targets).float()

    def decide(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.argmax(1)

    def metrics(self) -> Metrics:
        chosen: dict[str, Counter] = {"top1": Accuracy(self._num_classes)}
        if self._num_classes > 5:
            chosen["top5"] = TopK(self._num_classes, 5)
        return Counts(chosen)

    def details(self) -> Metrics:
        """Makes `confusion`, int64 [classes, classes], rows are true classes, and `per_class`, accuracies [classes].

        Above `DENSE_CLASSES` classes, the results of `ConfusedPairs` stand in place of `confusion`.
        """
        return Counts({**confusion(self._num_classes), "per_class": ClassAccuracy(self._num_classes)})
