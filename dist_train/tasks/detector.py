"""Geometry of a detector: its anchors, the coding of boxes against them, and its detections after suppression.

Nothing of it is in the model's graph: it is computed in float32 from the outputs of the dense part. Formulas and
thresholds are torchvision's (torchvision.models.detection: ssd.py, retinanet.py, fcos.py, _utils.py, anchor_utils.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image, nms

Kind = Literal["ssd", "retinanet", "fcos"]
Outputs = Mapping[str, Tensor]
"""Outputs of the dense part, as torchvision's heads name them.

`cls_logits` [B, A, classes + 1], whose first column is the background's; `bbox_regression` [B, A, 4]; of FCOS also
`bbox_ctrness` [B, A, 1]. A counts the anchors of all levels.
"""
_LARGEST_GROWTH = math.log(1000.0 / 16)  # of an anchor's side, as a logarithm


@dataclass(frozen=True)
class Level:
    """Anchors of one feature map: the same cells around the centre of each of its places.

    Attributes:
        grid: height and width of the feature map.
        step: distance of its places in pixels, down and to the right.
        offset: of the first centre, in steps: 0.5 for SSD, 0 for the others.
        cells: width and height in pixels of each anchor at a place.
    """

    grid: tuple[int, int]
    step: tuple[float, float]
    offset: float
    cells: tuple[tuple[float, float], ...]

    def anchors(self) -> Tensor:
        """Returns float32 [places x cells, 4] as x1, y1, x2, y2 in pixels: row by row of the map, then cell by cell."""
        down, right = (
            (torch.arange(size, dtype=torch.float32) + self.offset) * step
            for size, step in zip(self.grid, self.step, strict=True)
        )
        y, x = (each.reshape(-1, 1, 1) for each in torch.meshgrid(down, right, indexing="ij"))
        half = torch.tensor(self.cells, dtype=torch.float32).view(1, -1, 2) / 2
        centre = torch.cat([x, y], dim=2)
        return torch.cat([centre - half, centre + half], dim=2).view(-1, 4)


@dataclass(frozen=True)
class Detector:
    """Describes the dense outputs of a model for images of one size.

    Attributes:
        kind: of the losses and of the coding of boxes.
        size: height and width of the images in pixels.
        levels: of the anchors, in the order of the outputs.
        weights: of the four numbers of a coded box (SSD: 10, 10, 5, 5); ignored by fcos.
        score: the least score of a candidate.
        overlap: IoU above which suppression drops the less certain one of two boxes of a class.
        candidates: the most candidates before suppression: of each class for ssd, else of each level.
        most: the most detections of an image.
    """

    kind: Kind
    size: tuple[int, int]
    levels: tuple[Level, ...]
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    score: float = 0.05
    overlap: float = 0.5
    candidates: int = 400
    most: int = 100

    def as_json(self) -> dict[str, Any]:
        """Returns the fields for an artifact's manifest."""
        return asdict(self)

    @classmethod
    def of_json(cls, fields: Mapping[str, Any]) -> Detector:
        """Makes a detector of the fields that `as_json` returned, also after they were written as JSON."""
        levels = tuple(
            Level(tuple(each["grid"]), tuple(each["step"]), each["offset"], tuple(map(tuple, each["cells"])))
            for each in fields["levels"]
        )
        return cls(**{**fields, "levels": levels, "size": tuple(fields["size"]), "weights": tuple(fields["weights"])})

    def anchors(self) -> Tensor:
        """Returns the anchors of all levels, float32 [A, 4] as x1, y1, x2, y2 in pixels."""
        return torch.cat([level.anchors() for level in self.levels])

    @property
    def sizes(self) -> list[int]:
        """Anchors of each level."""
        return [level.grid[0] * level.grid[1] * len(level.cells) for level in self.levels]


def encode(boxes: Tensor, anchors: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Codes boxes [..., 4] against anchors [..., 4]: shifts of the centres and logarithms of growth, weighted.

    Ren et al. 2015, arXiv:1506.01497, section 3.1.2. Boxes without an area give numbers that are not finite.
    """
    centre, size = _centres(boxes)
    origin, unit = _centres(anchors)
    codes = torch.cat([(centre - origin) / unit, torch.log(size / unit)], dim=-1)
    return codes * codes.new_tensor(weights)


def decode(codes: Tensor, anchors: Tensor, detector: Detector) -> Tensor:
    """Returns the boxes that codes [..., 4] stand for, as x1, y1, x2, y2 in pixels."""
    origin, unit = _centres(anchors)
    if detector.kind == "fcos":  # distances of a box's sides from the centre, in sides of the anchor
        sides = codes * torch.cat([unit, unit], dim=-1)
        return torch.cat([origin - sides[..., :2], origin + sides[..., 2:]], dim=-1)
    codes = codes / codes.new_tensor(detector.weights)
    centre = codes[..., :2] * unit + origin
    half = codes[..., 2:].clamp(max=_LARGEST_GROWTH).exp() * unit / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def _centres(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns centres and sizes of boxes, [..., 2] each."""
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + size / 2, size


@dataclass(frozen=True)
class Found:
    """Detections of one image, the most certain first.

    Attributes:
        boxes: float32 [D, 4], x1, y1, x2, y2 in pixels.
        scores: float32 [D], in 0..1.
        classes: int64 [D], from 0.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor


@torch.no_grad()
def detections(outputs: Outputs, detector: Detector, anchors: Tensor | None = None) -> list[Found]:
    """Decodes the outputs of the dense part, and drops all but the most certain of overlapping boxes of a class.

    Args:
        outputs: of a batch of images.
        anchors: of the detector, on the outputs' device; None: they are computed.

    Returns:
        The detections of each image.
    """
    boxes, scores = _boxes_and_scores(outputs, detector, anchors)
    return [_of_image(*image, detector) for image in zip(boxes, scores, strict=True)]


def _boxes_and_scores(outputs: Outputs, detector: Detector, anchors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the box of each anchor within the image, [B, A, 4], and its scores, [B, A, classes]."""
    logits, codes = outputs["cls_logits"].float(), outputs["bbox_regression"].float()
    anchors = detector.anchors().to(logits.device) if anchors is None else anchors
    boxes = decode(codes, anchors, detector)
    if detector.kind == "ssd":
        scores = logits.softmax(-1)[..., 1:]
    elif detector.kind == "fcos":
        scores = (logits[..., 1:].sigmoid() * outputs["bbox_ctrness"].float().sigmoid()).sqrt()
    else:
        scores = logits[..., 1:].sigmoid()
    return clip_boxes_to_image(boxes, detector.size), scores


def _of_image(boxes: Tensor, scores: Tensor, detector: Detector) -> Found:
    """Returns the detections among boxes [A, 4] with scores [A, classes]."""
    score, place, label = _candidates(scores, detector)
    likely = score > detector.score
    score, place, label = score[likely], place[likely], label[likely]
    order = batched_nms(boxes[place], score, label, detector.overlap)[: detector.most]
    return Found(boxes[place[order]], score[order], label[order])


def _candidates(scores: Tensor, detector: Detector) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scores, places among the anchors, and classes of the candidates of one image, [N] each."""
    kept, places, classes = [], [], []
    if detector.kind == "ssd":
        best, rows = scores.topk(min(detector.candidates, len(scores)), dim=0)
        columns = torch.arange(scores.shape[1], device=scores.device).expand_as(rows)
        # Class by class, as torchvision lists them, so that ties are suppressed alike.
        kept, places, classes = [best.T.flatten()], [rows.T.flatten()], [columns.T.flatten()]
    else:
        start = 0
        for size in detector.sizes:
            level = scores[start : start + size].flatten()
            best, flat = level.topk(min(detector.candidates, len(level)))
            kept.append(best)
            places.append(flat.div(scores.shape[1], rounding_mode="floor") + start)
            classes.append(flat % scores.shape[1])
            start += size
    score, place, label = (torch.cat(parts) for parts in (kept, places, classes))
    return score, place, label


class BoxesOfImage(nn.Module):
    """Detections of one image as a graph of fixed shapes, which other runtimes take: `detections` of a batch of one.

    It returns boxes [D, 4], scores [D] and labels [D], D being `detector.most` or all candidates. After the last
    detection the scores are 0 and the labels -1.
    """

    anchors: Tensor

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self._detector = detector
        self.register_buffer("anchors", detector.anchors())

    def forward(
        self, cls_logits: Tensor, bbox_regression: Tensor, bbox_ctrness: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes the dense outputs for one image, [1, A, ...]."""
        detector = self._detector
        outputs = {"cls_logits": cls_logits, "bbox_regression": bbox_regression}
        if bbox_ctrness is not None:
            outputs["bbox_ctrness"] = bbox_ctrness
        boxes, scores = _boxes_and_scores(outputs, detector, self.anchors)
        score, place, label = _candidates(scores[0], detector)
        box = boxes[0][place]
        # Classes lie apart, so that boxes of two of them do not overlap, as in torchvision's batched_nms.
        apart = box + (label * (max(detector.size) + 1)).to(box.dtype)[:, None]
        kept = torch.zeros_like(score).index_fill(0, nms(apart, score, detector.overlap), 1.0)
        best, order = torch.where(score > detector.score, score * kept, 0.0).topk(min(detector.most, len(score)))
        return box[order], best, torch.where(best > 0, label[order], -1)
