"""Multi-label classification: a sample has any number of labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torchmetrics
from pydantic import Field
from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score
from torchmetrics.wrappers import LambdaInputTransformer

from dist_train.config.base import Settings
from dist_train.errors import DataError
from dist_train.tasks.base import Task, one_output, require_tensor, task_args, wrong_targets
from dist_train.tasks.label_counts import LabelConfusion, LabelPrecision
from dist_train.trees import Tree

# With fixed thresholds, average precision needs only counts: ranks add up, and no scores are kept.
_THRESHOLDS = 201


class _Args(Settings):
    pos_weight: float = Field(1.0, gt=0)
    """Weight of positive labels; above 1 where they are rare."""


class Multilabel(Task):
    """Multi-label classification: outputs float [B, labels], logits; targets [B, labels], 0 or 1, of any dtype.

    Loss: binary cross-entropy with logits, averaged over the labels. A label is predicted where its logit is above 0.
    Metrics: `map` (mean average precision over 201 thresholds), `f1` (macro), `exact_match` (all labels right).
    """

    headline = "map"
    score_name = "label acc"

    def __init__(self, num_labels: int, args: dict[str, Any]) -> None:
        self._num_labels = num_labels
        self._pos_weight = task_args("multilabel", _Args, args).pos_weight

    def pick(self, outputs: Tree) -> torch.Tensor:
        return one_output(outputs, "multilabel")

    def check_outputs(self, outputs: torch.Tensor) -> None:
        if outputs.shape != (2, self._num_labels):
            raise DataError(
                f"the model's outputs for 2 samples have shape {list(outputs.shape)}, "
                f"but the data has {self._num_labels} labels",
                "give the model a head of num_classes outputs; model.args must not set another number",
            )

    def check_targets(self, targets: Tree) -> None:
        require_tensor(targets, "multilabel")
        if targets.dim() != 2 or targets.shape[1] != self._num_labels:
            raise wrong_targets("multilabel", f"[N, {self._num_labels}] of 0 and 1", targets)
        others = targets[(targets != 0) & (targets != 1)]
        if others.numel():
            raise DataError(
                f"multilabel targets must be 0 or 1, got {float(others[0]):g}",
                "round them in the dataset: (target >= 0.5).float(); or --task.name regression for numbers, "
                "classification for one class index a sample",
            )

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        weight = outputs.new_full((), self._pos_weight)
        losses = F.binary_cross_entropy_with_logits(
            outputs, targets.to(outputs.dtype), reduction="none", pos_weight=weight
        )
        return losses.mean(1)

    def score(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (self.decide(outputs) == targets.bool()).float().mean(1)

    def decide(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs > 0

    def metrics(self) -> torchmetrics.MetricCollection:
        # torchmetrics applies a sigmoid only to batches with a value outside 0..1, so it never gets logits.
        chosen: dict[str, torchmetrics.Metric | torchmetrics.MetricCollection] = {
            "map": LambdaInputTransformer(
                LabelPrecision(self._num_labels, thresholds=_THRESHOLDS), torch.sigmoid, _integers
            ),
            "f1": LambdaInputTransformer(MultilabelF1Score(self._num_labels, average="macro"), _decided, _integers),
            "exact_match": LambdaInputTransformer(MultilabelExactMatch(self._num_labels), _decided, _integers),
        }
        return torchmetrics.MetricCollection(chosen, compute_groups=False)

    def details(self) -> torchmetrics.MetricCollection:
        """Makes `label_confusion`, int64 [labels, 2, 2], rows are the truth, and `label_f1`, float [labels]."""
        return torchmetrics.MetricCollection(
            {
                "label_confusion": LambdaInputTransformer(LabelConfusion(self._num_labels), _decided, _integers),
                "label_f1": LambdaInputTransformer(
                    MultilabelF1Score(self._num_labels, average="none"), _decided, _integers
                ),
            },
            compute_groups=False,
        )


def _integers(targets: torch.Tensor) -> torch.Tensor:
    return targets.long()


def _decided(outputs: torch.Tensor) -> torch.Tensor:
    return (outputs > 0).long()
