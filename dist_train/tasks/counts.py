"""Metrics that count decisions in memory proportional to samples and classes, deterministic on CPU and CUDA.

torchmetrics' own confusion matrix allocates samples x classes^2 numbers an update under
`torch.use_deterministic_algorithms`: 256 samples of 1,000 classes take 2 GB. These add into integers instead, whose
sums do not depend on the order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelConfusionMatrix

DENSE_CLASSES = 256
"""The most classes for which a whole confusion matrix is kept: 0.5 MB, which a report can still draw."""

MOST_PAIRS = 1000
"""The most pairs of classes that are listed where there are more classes."""

_FEW = 2**16  # codes that wait for a merge at most, unless there are more distinct ones


def confusion(num_classes: int, ignored: int | None = None) -> dict[str, Metric]:
    """Makes the metric of classes taken for each other: a matrix for few classes, the worst pairs for many.

    Returns:
        `confusion` up to DENSE_CLASSES classes, else `confused_pairs`, by its name in `Task.details`.
    """
    if num_classes <= DENSE_CLASSES:
        return {"confusion": Confusion(num_classes, ignored)}
    return {"confused_pairs": ConfusedPairs(num_classes, ignored)}


class _Counter(Metric):
    """A metric of integers that ranks add up; updates take outputs [B, classes, ...] and targets [B, ...]."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, num_classes: int, ignored: int | None = None) -> None:
        super().__init__()
        self._num_classes = num_classes
        self._ignored = ignored

    def _count(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _labels(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the classes of the targets and of the decisions, int64 [counted samples or pixels]."""
        decisions, targets = outputs.argmax(1).flatten(), targets.flatten().long()
        if self._ignored is None:
            return targets, decisions
        counted = targets != self._ignored
        return targets[counted], decisions[counted]


def _add(counts: Tensor, places: Tensor) -> None:
    """Adds 1 to `counts`, int64 of any shape, at each flat index in `places`."""
    places = places.flatten()
    counts.view(-1).index_add_(0, places, torch.ones_like(places))


class TopK(_Counter):
    """Share of the samples whose class is among the `k` largest outputs."""

    right: Tensor
    samples: Tensor

    def __init__(self, num_classes: int, k: int) -> None:
        super().__init__(num_classes)
        self._k = k
        self._count("right")
        self._count("samples")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        best = outputs.topk(self._k, dim=1).indices
        self.right += (best == targets[:, None]).any(1).sum()
        self.samples += len(targets)

    def compute(self) -> Tensor:
        return _share(self.right, self.samples)


class _PerClass(_Counter):
    """Counts each class as target, as decision, and as both."""

    targets: Tensor
    decisions: Tensor
    right: Tensor

    def __init__(self, num_classes: int, ignored: int | None = None) -> None:
        super().__init__(num_classes, ignored)
        for name in ("targets", "decisions", "right"):
            self._count(name, num_classes)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        classes, decisions = self._labels(outputs, targets)
        _add(self.targets, classes)
        _add(self.decisions, decisions)
        _add(self.right, classes[classes == decisions])


class ClassAccuracy(_PerClass):
    """Accuracy of each class, float [classes]; 0 for a class without samples."""

    def compute(self) -> Tensor:
        return _share(self.right, self.targets)


class ClassIoU(_PerClass):
    """Intersection over union of each class, float [classes]; 0 for a class that does not occur."""

    def compute(self) -> Tensor:
        return _share(self.right, self.targets + self.decisions - self.right)


class MeanIoU(ClassIoU):
    """Mean intersection over union of the classes that occur as target or decision, except the ignored one."""

    def compute(self) -> Tensor:
        occurs = (self.targets + self.decisions > 0).float()
        if self._ignored is not None and 0 <= self._ignored < self._num_classes:
            occurs[self._ignored] = 0
        return (occurs * super().compute() / occurs.sum()).sum()


class Confusion(_Counter):
    """Confusion matrix, int64 [classes, classes]; rows are targets."""

    matrix: Tensor

    def __init__(self, num_classes: int, ignored: int | None = None) -> None:
        super().__init__(num_classes, ignored)
        self._count("matrix", num_classes, num_classes)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        classes, decisions = self._labels(outputs, targets)
        _add(self.matrix, classes * self._num_classes + decisions)

    def compute(self) -> Tensor:
        return self.matrix


class ConfusedPairs(_Counter):
    """The classes most often taken for each other, out of any number of classes.

    Memory follows the classes and the distinct pairs that occur, of which there are at most as many as mistakes.

    Result:
        confused_pairs: int64 [pairs, 4]: target, decision, samples, and all samples of the target's class. Most
            samples first, then by target and decision; at most MOST_PAIRS.
        num_pairs, num_wrong, num_samples: distinct pairs, mistakes and samples in all.
    """

    targets: Tensor
    codes: list[Tensor]  # target x classes + decision of each pair, distinct within a tensor
    counts: list[Tensor]

    def __init__(self, num_classes: int, ignored: int | None = None) -> None:
        super().__init__(num_classes, ignored)
        self._count("targets", num_classes)
        self.add_state("codes", [], dist_reduce_fx="cat")
        self.add_state("counts", [], dist_reduce_fx="cat")

    @property
    def dtype(self) -> torch.dtype:
        """The states' dtype: torchmetrics makes an empty state of a rank without mistakes from it."""
        return torch.int64

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        classes, decisions = self._labels(outputs, targets)
        _add(self.targets, classes)
        wrong = classes != decisions
        codes, counts = (classes[wrong] * self._num_classes + decisions[wrong]).unique(return_counts=True)
        if not len(codes):
            return
        self.codes.append(codes)
        self.counts.append(counts)
        # Merging when the pairs have doubled costs a constant number of sorts of each code.
        if sum(map(len, self.codes)) > max(2 * len(self.codes[0]), _FEW):
            merged, sums = _merged(torch.cat(self.codes), torch.cat(self.counts))
            self.codes, self.counts = [merged], [sums]

    def compute(self) -> dict[str, Tensor]:
        codes, counts = _merged(*(_joined(state, self.targets) for state in (self.codes, self.counts)))
        most = counts.sort(descending=True, stable=True).indices[:MOST_PAIRS]
        classes, decisions = codes[most] // self._num_classes, codes[most] % self._num_classes
        return {
            "confused_pairs": torch.stack([classes, decisions, counts[most], self.targets[classes]], 1),
            "num_pairs": codes.new_tensor(len(codes)),
            "num_wrong": counts.sum(),
            "num_samples": self.targets.sum(),
        }


def _joined(state: list[Tensor] | Tensor, like: Tensor) -> Tensor:
    """Returns a list state as one tensor; after the ranks' exchange it is one already."""
    return state if isinstance(state, Tensor) else torch.cat([like.new_empty(0), *state])


def _merged(codes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the distinct codes, ascending, and the sum of each one's counts."""
    distinct, places = codes.unique(return_inverse=True)
    return distinct, torch.zeros_like(distinct).index_add_(0, places, counts)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Divides integers as float32; 0 where `whole` is 0."""
    return part.float() / whole.float().masked_fill(whole == 0, 1)


class LabelConfusion(MultilabelConfusionMatrix):
    """torchmetrics' matrices of labels, counted without samples x labels^2 numbers; takes 0 and 1 [B, labels]."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        labels = torch.arange(self.num_labels, device=preds.device)
        _add(self.confmat, 4 * labels + 2 * target + preds)


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
        _add(counts, (reached * self.num_labels + labels) * 2 + target)
        below = counts.cumsum(0)
        # A label is predicted at a threshold that its score reaches.
        self.confmat += torch.stack([below[:-1], below[-1:] - below[:-1]], dim=3)
