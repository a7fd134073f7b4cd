"""Boxes for tests of detection: random targets, and torchvision's own answers about them."""

from __future__ import annotations

from typing import Any

import torch
import torchvision.models.detection as zoo
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from dist_train.models.detection import DenseDetector, _describer

SIZE = 96
CLASSES = 3


def targets(images: int, most: int = 5, empty: tuple[int, ...] = (), seed: int = 0) -> dict[str, Tensor]:
    """Returns random boxes within SIZE pixels; the padding is at the end of some rows and between others."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(images, most, 2, generator=generator) * SIZE * 0.6
    size = 6 + torch.rand(images, most, 2, generator=generator) * SIZE * 0.33
    label = torch.randint(CLASSES, (images, most, 1), generator=generator).float()
    mask = torch.rand(images, most, generator=generator) < 0.7
    mask[:, most // 2] = True
    mask[list(empty)] = False
    boxes = torch.cat([label, corner, corner + size], 2)
    return {"boxes": boxes * mask.unsqueeze(-1), "mask": mask}


def as_torchvision(made: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [
        {"boxes": rows[real][:, 1:], "labels": rows[real][:, 0].long() + 1}
        for rows, real in zip(made["boxes"], made["mask"], strict=True)
    ]


def torchvisions(name: str, **args: Any) -> tuple[Any, DenseDetector]:
    """Returns torchvision's detector, untrained, and our dense part of it, which shares its layers."""
    torch.manual_seed(0)
    model: Any = getattr(zoo, name)(weights=None, weights_backbone=None, num_classes=CLASSES + 1, **args).eval()
    limits = {
        "score": model.score_thresh,
        "overlap": model.nms_thresh,
        "candidates": model.topk_candidates,
        "most": model.detections_per_img,
    }
    describe = _describer(model, model.anchor_generator, limits)
    return model, DenseDetector(model.backbone, model.head, describe).eval()


def its_loss(model: Any, outputs: dict[str, Tensor], anchors: list[Tensor], sizes: list[int], made: Any) -> Tensor:
    """Returns torchvision's loss of a batch, all parts together."""
    wanted = as_torchvision(made)
    if hasattr(model, "center_sampling_radius"):
        losses = model.compute_loss(wanted, outputs, anchors, sizes)
    elif hasattr(model, "neg_to_pos_ratio"):
        matched = [
            model.proposal_matcher(box_iou(each["boxes"], own)) if len(each["boxes"]) else torch.full((len(own),), -1)
            for each, own in zip(wanted, anchors, strict=True)
        ]
        losses = model.compute_loss(wanted, outputs, anchors, matched)
    else:
        losses = model.compute_loss(wanted, outputs, anchors)
    return sum(losses.values())  # type: ignore[return-value]


def its_anchors(model: Any, dense: DenseDetector, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        features = dense._features(images)
    found: list[Tensor] = model.anchor_generator(ImageList(images, [(SIZE, SIZE)] * len(images)), features)
    return found


def its_detections(
    model: Any, outputs: dict[str, Tensor], anchors: list[Tensor], sizes: list[int]
) -> list[dict[str, Tensor]]:
    shapes = [(SIZE, SIZE)] * len(anchors)
    if hasattr(model, "neg_to_pos_ratio"):
        found: list[dict[str, Tensor]] = model.postprocess_detections(outputs, anchors, shapes)
        return found
    split = {name: list(each.split(sizes, dim=1)) for name, each in outputs.items()}
    return model.postprocess_detections(split, [list(each.split(sizes)) for each in anchors], shapes)  # type: ignore[no-any-return]
