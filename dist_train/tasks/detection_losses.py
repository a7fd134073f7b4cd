"""Losses of detectors by torchvision's formulas, as sums over a batch and their counts, and the matching of anchors.

They are those of torchvision.models.detection, without its loop over images: targets are padded, and a mask says
which rows are boxes. Means over a batch become sums and counts, so that ranks add up to the global batch's mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from dist_train.tasks.detector import Detector, Outputs, decode, encode

_NOTHING, _UNDECIDED = -1, -2  # in place of a box: background; neither background nor a box
_NEGATIVES = 3  # background anchors for each matched one, of SSD
_CENTRE = 1.5  # largest distance of an anchor's centre from a box's, in sides of the anchor, of FCOS
_LARGE = 1e8  # pixels; no box has as many


@dataclass(frozen=True)
class Matched:
    """Boxes that the anchors of a batch stand for.

    Attributes:
        inside: bool [B, A], True where an anchor has a box.
        ignored: bool [B, A], True where it counts neither as box nor as background.
        boxes: float32 [B, A, 4], its box; of the others the anchor itself.
        columns: int64 [B, A], the column of its class in `cls_logits`; 0, the background's, for the others.
    """

    inside: Tensor
    ignored: Tensor
    boxes: Tensor
    columns: Tensor


@torch.no_grad()
def match(rows: Tensor, mask: Tensor, anchors: Tensor, detector: Detector) -> Matched:
    """Matches anchors [A, 4] with the boxes of a batch.

    Args:
        rows: float32 [B, M, 5], the class and x1, y1, x2, y2 in pixels of each box.
        mask: bool [B, M], True for rows that are boxes. M may be 0.
    """
    if not rows.shape[1]:
        rows, mask = rows.new_zeros(len(rows), 1, 5), mask.new_zeros(len(rows), 1)
    find = _by_centre if detector.kind == "fcos" else _by_overlap
    found = torch.stack(
        [find(boxes[real][:, 1:], real, anchors, detector) for boxes, real in zip(rows, mask, strict=True)]
    )
    inside = found >= 0
    chosen = rows.gather(1, found.clamp(min=0).unsqueeze(-1).expand(-1, -1, 5))
    boxes = torch.where(inside.unsqueeze(-1), chosen[..., 1:], anchors)
    columns = torch.where(inside, chosen[..., 0].long() + 1, 0)
    return Matched(inside, found == _UNDECIDED, boxes, columns)


def _by_overlap(boxes: Tensor, real: Tensor, anchors: Tensor, detector: Detector) -> Tensor:
    """Returns for each anchor the row of the box that it overlaps most, int64 [A]; negative for none.

    Each box also gets anchors that overlap it less, where none overlaps it by half: of SSD the best one, of RetinaNet
    all that are as good as the best.
    """
    if not len(boxes):
        return torch.full((len(anchors),), _NOTHING, device=anchors.device)
    overlap = box_iou(boxes, anchors)
    value, nearest = overlap.max(0)
    found = torch.where(value < 0.5, _NOTHING, nearest)
    if detector.kind == "ssd":
        # Where two boxes have one best anchor, the last one takes it, on every device.
        rows = torch.arange(len(boxes), device=boxes.device)
        taken = torch.full_like(found, _NOTHING).scatter_reduce_(0, overlap.max(1).indices, rows, "amax")
        found = torch.where(taken >= 0, taken, found)
    else:
        found = torch.where((value >= 0.4) & (value < 0.5), _UNDECIDED, found)
        as_good = (overlap == overlap.max(1, keepdim=True).values).any(0)
        found = torch.where(as_good, nearest, found)
    return _rows_of(found, real)


def _by_centre(boxes: Tensor, real: Tensor, anchors: Tensor, detector: Detector) -> Tensor:
    """Returns for each anchor the row of the smallest box around it whose size suits its level, int64 [A]; or -1.

    Tian et al. 2020, arXiv:2006.09214, with sampling of centres.
    """
    if not len(boxes):
        return torch.full((len(anchors),), _NOTHING, device=anchors.device)
    centres, side = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2] - anchors[:, 0]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    near = (centres[:, None] - middle[None]).abs().max(2).values < _CENTRE * side[:, None]
    distances = torch.cat([centres[:, None] - boxes[None, :, :2], boxes[None, :, 2:] - centres[:, None]], 2)
    least, most = side * 4, side * 8
    sizes = detector.sizes
    least[: sizes[0]] = 0
    most[-sizes[-1] :] = torch.inf
    farthest = distances.max(2).values
    fits = near & (distances.min(2).values > 0) & (farthest > least[:, None]) & (farthest < most[:, None])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    value, smallest = (fits * (_LARGE - areas[None])).max(1)
    return _rows_of(torch.where(value < 1e-5, _NOTHING, smallest), real)


def _rows_of(found: Tensor, real: Tensor) -> Tensor:
    """Returns rows of the padded targets for places among the real boxes; negative ones stay."""
    rows = real.nonzero().flatten()
    return torch.where(found >= 0, rows[found.clamp(min=0)], found)


def summed_loss(outputs: Outputs, matched: Matched, anchors: Tensor, detector: Detector) -> tuple[Tensor, Tensor]:
    """Returns the sum of a batch's losses, float [], and its count, float [].

    Of ssd and fcos the count is that of matched anchors; of retinanet, whose images are divided by their own matched
    anchors, that of images.
    """
    losses = image_losses(outputs, matched, anchors, detector)
    inside = matched.inside.sum(1)
    if detector.kind == "retinanet":
        return (losses / inside.clamp(min=1)).sum(), losses.new_tensor(len(losses))
    return losses.sum(), inside.sum().to(losses.dtype)


def image_losses(outputs: Outputs, matched: Matched, anchors: Tensor, detector: Detector) -> Tensor:
    """Returns each image's sum of losses, float [B], not divided by its matched anchors."""
    return {"ssd": _ssd, "retinanet": _retinanet, "fcos": _fcos}[detector.kind](outputs, matched, anchors, detector)


def _ssd(outputs: Outputs, matched: Matched, anchors: Tensor, detector: Detector) -> Tensor:
    """Liu et al. 2016, arXiv:1512.02325: smooth L1, and cross-entropy with the worst three negatives a match."""
    logits = outputs["cls_logits"]
    wanted = encode(matched.boxes, anchors, detector.weights)
    boxes = F.smooth_l1_loss(outputs["bbox_regression"], wanted, reduction="none").sum(2)
    classes = F.cross_entropy(logits.flatten(0, 1), matched.columns.flatten(), reduction="none")
    classes = classes.view(matched.columns.shape)
    with torch.no_grad():
        worst = classes.masked_fill(matched.inside, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        hard = worst.argsort(1) < _NEGATIVES * matched.inside.sum(1, keepdim=True)
    return _sum(boxes, matched.inside) + _sum(classes, matched.inside | hard)


def _retinanet(outputs: Outputs, matched: Matched, anchors: Tensor, detector: Detector) -> Tensor:
    """Lin et al. 2017, arXiv:1708.02002: L1 and focal loss of the classes, without undecided anchors."""
    wanted = encode(matched.boxes, anchors, detector.weights)
    boxes = (outputs["bbox_regression"] - wanted).abs().sum(2)
    return _sum(boxes, matched.inside) + _sum(_focal(outputs, matched), ~matched.ignored)


def _fcos(outputs: Outputs, matched: Matched, anchors: Tensor, detector: Detector) -> Tensor:
    """Tian et al. 2020, arXiv:2006.09214: focal loss of the classes, GIoU of the boxes, and centerness."""
    boxes = generalized_box_iou_loss(decode(outputs["bbox_regression"], anchors, detector), matched.boxes)
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    before, behind = centre - matched.boxes[..., :2], matched.boxes[..., 2:] - centre
    share = torch.minimum(before, behind) / torch.maximum(before, behind)
    centerness = F.binary_cross_entropy_with_logits(
        outputs["bbox_ctrness"].squeeze(2), share.prod(2).clamp(min=0).sqrt(), reduction="none"
    )
    return _focal(outputs, matched).sum(1) + _sum(boxes + centerness, matched.inside)


def _focal(outputs: Outputs, matched: Matched) -> Tensor:
    """Returns each anchor's focal loss over all columns, [B, A]; the background's column is never wanted."""
    logits = outputs["cls_logits"]
    wanted = F.one_hot(matched.columns, logits.shape[2]).to(logits.dtype) * matched.inside.unsqueeze(-1)
    return sigmoid_focal_loss(logits, wanted, reduction="none").sum(2)


def _sum(losses: Tensor, counted: Tensor) -> Tensor:
    """Returns each image's sum of the counted anchors' losses, [B]."""
    return torch.where(counted, losses, 0.0).sum(1)
