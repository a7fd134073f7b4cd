"""Metrics that count decisions in memory proportional to samples and classes, deterministic on CPU and CUDA.

torchmetrics' own confusion matrix allocates samples x classes^2 numbers an update under
`torch.use_deterministic_algorithms`: 256 samples of 1,000 classes take 2 GB. These add into integers instead, whose
sums do not depend on the order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_train.tasks.counter import Counter, count_at, gathered, share

DENSE_CLASSES = 256
"""The most classes for which a whole confusion matrix is kept: 0.5 MB, which a report can still draw."""

MOST_PAIRS = 1000
"""The most pairs of classes that are listed where there are more classes."""

_FEW = 2**16  # codes that wait for a merge at most, unless there are more distinct ones


def confusion(num_classes: int, ignored: int | None = None) -> dict[str, Counter]:
    """Makes the metric of classes taken for each other: a matrix for few classes, the worst pairs for many.

    Returns:
        `confusion` up to DENSE_CLASSES classes, else `confused_pairs`, by its name in `Task.details`.
    """
    if num_classes <= DENSE_CLASSES:
        return {"confusion": Confusion(num_classes, ignored)}
    return {"confused_pairs": ConfusedPairs(num_classes, ignored)}


class Accuracy(Counter):
    """Share of the samples or pixels whose class has the largest output."""

    right: Tensor
    samples: Tensor

    def __init__(self, num_classes: int, ignored: int | None = None) -> None:
        super().__init__(num_classes, ignored)
        self._count("right")
        self._count("samples")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        classes, decisions = self._labels(outputs, targets)
        self.right += (classes == decisions).sum()
        self.samples += len(classes)

    def compute(self) -> Tensor:
        return share(self.right, self.samples)


class TopK(Counter):
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
        return share(self.right, self.samples)


class _PerClass(Counter):
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
        count_at(self.targets, classes)
        count_at(self.decisions, decisions)
        count_at(self.right, classes[classes == decisions])


class ClassAccuracy(_PerClass):
    """Accuracy of each class, float [classes]; 0 for a class without samples."""

    def compute(self) -> Tensor:
        return share(self.right, self.targets)


class ClassIoU(_PerClass):
    """Intersection over union of each class, float [classes]; 0 for a class that does not occur."""

    def compute(self) -> Tensor:
        return share(self.right, self.targets + self.decisions - self.right)


class MeanIoU(ClassIoU):
    """Mean intersection over union of the classes that occur as target or decision, but the ignored one; 0 for none."""

    def compute(self) -> Tensor:
        occurs = (self.targets + self.decisions > 0).float()
        if self._ignored is not None and 0 <= self._ignored < self._num_classes:
            occurs[self._ignored] = 0
        return (occurs * super().compute() / occurs.sum().clamp(min=1)).sum()


class Confusion(Counter):
    """Confusion matrix, int64 [classes, classes]; rows are targets."""

    matrix: Tensor

    def __init__(self, num_classes: int, ignored: int | None = None) -> None:
        super().__init__(num_classes, ignored)
        self._count("matrix", num_classes, num_classes)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        classes, decisions = self._labels(outputs, targets)
        count_at(self.matrix, classes * self._num_classes + decisions)

    def compute(self) -> Tensor:
        return self.matrix


class ConfusedPairs(Counter):
    """The classes most often taken for each other, out of any number of classes.

    Memory follows the classes and the distinct pairs that occur, of which there are at most as many as mistakes.

    Result:
        confused_pairs: int64 [pairs, 4]: target, decision, samples, and all samples of the target's class. Most
            samples first, then by target and decision; at most MOST_PAIRS.
        num_pairs, num_wrong, num_samples: distinct pairs, mistakes and samples in all.
    """

    targets: Tensor

    def __init__(self, num_classes: int, ignored: int | None = None) -> None:
        super().__init__(num_classes, ignored)
        self._count("targets", num_classes)
        # target x classes + decision of each pair, distinct within a tensor; and how often each occurs
        self.codes: list[Tensor] = []
        self.counts: list[Tensor] = []

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.codes, self.counts = ([each.to(device) for each in state] for state in (self.codes, self.counts))

    def gather(self) -> None:
        own = torch.stack(self._merged())
        sizes = [int(size) for size in gathered(own.new_tensor([own.shape[1]]))]
        padded = torch.nn.functional.pad(own, (0, max(sizes) - own.shape[1]))
        pairs = [rank[:, :size] for rank, size in zip(gathered(padded), sizes, strict=True)]
        self.codes, self.counts = [each[0] for each in pairs], [each[1] for each in pairs]

    def _merged(self) -> tuple[Tensor, Tensor]:
        """Returns the distinct codes, ascending, and the sum of each one's counts."""
        codes, counts = (torch.cat([self.targets.new_empty(0), *state]) for state in (self.codes, self.counts))
        distinct, places = codes.unique(return_inverse=True)
        return distinct, torch.zeros_like(distinct).index_add_(0, places, counts)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        classes, decisions = self._labels(outputs, targets)
        count_at(self.targets, classes)
        wrong = classes != decisions
        codes, counts = (classes[wrong] * self._num_classes + decisions[wrong]).unique(return_counts=True)
        if not len(codes):
            return
        self.codes.append(codes)
        self.counts.append(counts)
        # Merging when the pairs have doubled costs a constant number of sorts of each code.
        if sum(map(len, self.codes)) > max(2 * len(self.codes[0]), _FEW):
            merged, sums = self._merged()
            self.codes, self.counts = [merged], [sums]

    def compute(self) -> dict[str, Tensor]:
        codes, counts = self._merged()
        most = counts.sort(descending=True, stable=True).indices[:MOST_PAIRS]
        classes, decisions = codes[most] // self._num_classes, codes[most] % self._num_classes
        return {
            "confused_pairs": torch.stack([classes, decisions, counts[most], self.targets[classes]], 1),
            "num_pairs": codes.new_tensor(len(codes)),
            "num_wrong": counts.sum(),
            "num_samples": self.targets.sum(),
        }
