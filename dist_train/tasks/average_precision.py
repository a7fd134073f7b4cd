"""Mean average precision of boxes, exact over ranks, by COCO's rules: IoU 0.5 to 0.95, 101 points of recall.

Lin et al. 2014, arXiv:1405.0312, and cocodataset.org/#detection-eval. Sizes of objects are not told apart, and there
are no crowds: a dataset leaves them out. It needs no pycocotools. Detections of one score count as one step of the
curve, so that the result does not depend on the order of images, and so not on the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from dist_train.tasks.counter import gathered
from dist_train.tasks.detector import Found, Outputs

OVERLAPS = tuple(0.5 + 0.05 * step for step in range(10))
"""The least IoU at which a detection is right; precision is averaged over them."""
_RECALLS = 101


class Finds(Protocol):
    """Detects the objects of a batch."""

    def __call__(self, outputs: Outputs) -> list[Found]: ...


class AveragePrecision:
    """The metrics `map` (mean over IoU 0.5 to 0.95) and `map50` (IoU 0.5) of an evaluation.

    Both are means over the classes that occur; 0 where none does. Updates take the outputs of a detector's dense part
    and targets {"boxes": [B, M, 5], "mask": [B, M]}.
    """

    def __init__(self, num_classes: int, find: Finds) -> None:
        self._find = find
        self._truths = torch.zeros(num_classes, dtype=torch.int64)
        # of each detection: its score, its class, and for each of OVERLAPS 1 where it is right
        self._rows: list[Tensor] = []

    def __iter__(self) -> Iterator[str]:
        return iter(("map", "map50"))

    def to(self, device: torch.device) -> AveragePrecision:
        """Moves the counts to a device."""
        self._truths = self._truths.to(device)
        return self

    def update(self, outputs: Outputs, targets: dict[str, Tensor]) -> None:
        """Adds a batch."""
        for found, rows, mask in zip(self._find(outputs), targets["boxes"], targets["mask"], strict=True):
            truth = rows[mask.bool()]
            classes = truth[:, 0].long()
            self._truths += F.one_hot(classes, len(self._truths)).sum(0)
            right = matches(found, truth[:, 1:], classes)
            self._rows.append(torch.cat([found.scores[:, None], found.classes[:, None].float(), right.float()], 1))

    def compute(self) -> dict[str, Tensor]:
        """Returns both metrics over the samples of all ranks. Collective."""
        truths = self._truths.clone()
        width = 2 + len(OVERLAPS)
        rows = torch.cat([truths.new_zeros(0, width, dtype=torch.float32), *self._rows])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(truths)
            sizes = [int(size) for size in gathered(truths.new_tensor([len(rows)]))]
            padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
            rows = torch.cat([rank[:size] for rank, size in zip(gathered(padded), sizes, strict=True)])
        present = truths.nonzero().flatten().tolist()
        if not present:
            return {name: torch.tensor(0.0) for name in self}
        precisions = torch.stack([_precision(rows[rows[:, 1] == label], int(truths[label])) for label in present])
        return {"map": precisions.mean().float(), "map50": precisions[:, 0].mean().float()}


def matches(found: Found, boxes: Tensor, classes: Tensor) -> Tensor:
    """Tells for each detection of an image whether it is right, bool [D, overlaps].

    The most certain first, each takes the box of its class that it overlaps most among those that are still free.

    Args:
        boxes: float32 [N, 4], the true ones.
        classes: int64 [N].
    """
    right = torch.zeros(len(found.scores), len(OVERLAPS), dtype=torch.bool)
    if not len(found.scores) or not len(boxes):
        return right.to(boxes.device)
    # Small matrices, walked row by row: on the CPU.
    overlap = box_iou(found.boxes, boxes).masked_fill(found.classes[:, None] != classes, -1.0).cpu()
    least = torch.tensor(OVERLAPS)
    free = torch.ones(len(OVERLAPS), len(boxes), dtype=torch.bool)
    places = torch.arange(len(OVERLAPS))
    for detection in range(len(overlap)):
        value, box = torch.where(free, overlap[detection], -1.0).max(1)
        right[detection] = value >= least - 1e-10
        free[places[right[detection]], box[right[detection]]] = False
    return right.to(boxes.device)


def _precision(rows: Tensor, truths: int) -> Tensor:
    """Returns one class's average precision at each of OVERLAPS, float64 [overlaps].

    rows: float32 [D, 2 + overlaps], the detections of this class on all ranks.
    """
    if not len(rows):
        return torch.zeros(len(OVERLAPS), dtype=torch.float64, device=rows.device)
    rows = rows[rows[:, 0].sort(descending=True).indices]
    _, counts = rows[:, 0].unique_consecutive(return_counts=True)
    ends = counts.cumsum(0) - 1
    right = rows[:, 2:].double().cumsum(0)[ends]
    recall = right / truths
    precision = right / (ends + 1).double()[:, None]
    # The best precision at this recall or more.
    best = precision.flip(0).cummax(0).values.flip(0)
    # pycocotools' own numbers: torch's linspace differs in last bits, and a recall may be equal to one of them.
    wanted = torch.from_numpy(np.linspace(0, 1, _RECALLS)).to(rows.device).expand(len(OVERLAPS), -1)
    place = torch.searchsorted(recall.T.contiguous(), wanted.contiguous())
    padded = F.pad(best, (0, 0, 0, 1))  # 0 where no such recall is reached
    return padded.gather(0, place.T).mean(0)
