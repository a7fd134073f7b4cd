"""torchmetrics' metrics of labels, counted in memory proportional to samples and labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelConfusionMatrix

from dist_train.tasks.counter import count_at


class LabelConfusion(MultilabelConfusionMatrix):
    """torchmetrics' matrices of labels, counted without samples x labels^2 numbers; takes 0 and 1 [B, labels]."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        labels = torch.arange(self.num_labels, device=preds.device)
        count_at(self.confmat, 4 * labels + 2 * target + preds)


class LabelPrecision(MultilabelAveragePrecision):
    """torchmetrics' mean average precision at fixed thresholds, counted without samples x labels x thresholds numbers.

    It takes probabilities and targets of 0 and 1, both [B, labels].
    """

    confmat: Tensor

    def update(self, preds: Tensor, target: Tensor) -> None:
        thresholds = self.get_buffer("thresholds")
        labels = torch.arange(self.num_labels, device=preds.device)
        reached = torch.searchsorted(thresholds, preds.contiguous(), right=True)  # thresholds at or below
        counts = self.confmat.new_zeros(len(thresholds) + 1, self.num_labels, 2)
        count_at(counts, (reached * self.num_labels + labels) * 2 + target)
        below = counts.cumsum(0)
        # A label is predicted at a threshold that its score reaches.
        self.confmat += torch.stack([below[:-1], below[-1:] - below[:-1]], dim=3)
