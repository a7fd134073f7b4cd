"""Augments an image with its boxes: mirrors and crops move both. Pads boxes to targets of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from dist_train.config.data import RandomHorizontalFlip, RandomResizedCrop
from dist_train.data.image_steps import Crop, scale_into
from dist_train.errors import ConfigError, Problem

_LEAST_SIDE = 1.0  # pixels of a box after a crop


class BoxSteps:
    """The leading steps of data.augment, for one image and its boxes.

    Args:
        augment: data.augment; of it random_resized_crop and random_horizontal_flip apply, up to the first other entry.
        size: pixels of an input's edges: images are scaled to it without keeping their aspect ratio.

    Raises:
        ConfigError: a later entry would move the images, but not their boxes.
    """

    def __init__(self, augment: Sequence[Any], size: int) -> None:
        steps = list(takewhile(_moves_boxes, augment))
        for place, step in enumerate(augment[len(steps) :], start=len(steps)):
            if _moves_boxes(step) or step.name == "random_crop":
                message = f"{step.name} would move the images, but not their boxes"
                hint = "random_resized_crop and random_horizontal_flip move both, as the first entries"
                raise ConfigError([Problem(f"data.augment.{place}", message, hint=hint)])
        self.count = len(steps)
        self._steps = [Crop(step) if isinstance(step, RandomResizedCrop) else float(step.p) for step in steps]
        self._size = size

    def plain(self, image: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scales an image, uint8 [C, h, w], and its boxes, float [N, 5]: class and corners in pixels."""
        return self._cut(image, rows, (0, 0, image.shape[1], image.shape[2]))

    def augmented(self, image: Tensor, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Like `plain`, after the steps, as a function of `seed` alone. Boxes whose centre is cut off are left out."""
        torch.default_generator.manual_seed(seed)
        window, mirrored = (0, 0, image.shape[1], image.shape[2]), False
        for step in self._steps:
            if isinstance(step, Crop):
                top, left, height, width = step.box(*window[2:])
                if mirrored:  # the crop is one of the mirrored image
                    left = window[3] - left - width
                window = (window[0] + top, window[1] + left, height, width)
            else:
                mirrored ^= bool(torch.rand(1) < step)
        pixels, rows = self._cut(image, rows, window)
        return (pixels.flip(-1), mirror(rows, self._size)) if mirrored else (pixels, rows)

    def _cut(self, image: Tensor, rows: Tensor, window: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        top, left, height, width = window
        out = torch.empty(image.shape[0], self._size, self._size, dtype=torch.uint8)
        scale_into(image[:, top : top + height, left : left + width], out)
        scale = torch.tensor([self._size / width, self._size / height]).repeat(2)
        corners = (rows[:, 1:] - torch.tensor([left, top], dtype=torch.float32).repeat(2)) * scale
        centre = (corners[:, :2] + corners[:, 2:]) / 2
        inside = ((centre >= 0) & (centre < self._size)).all(1)
        corners = corners.clamp(0, self._size)
        sides = (corners[:, 2:] - corners[:, :2]).amin(1)
        # Of a whole image also small boxes stay, but for those that its scaling makes nothing of.
        large = sides > 0 if window[2:] == tuple(image.shape[1:]) else sides >= _LEAST_SIDE
        return out, torch.cat([rows[:, :1], corners], 1)[inside & large]


def _moves_boxes(step: Any) -> bool:
    return isinstance(step, (RandomResizedCrop, RandomHorizontalFlip))


def mirror(rows: Tensor, width: float) -> Tensor:
    """Mirrors boxes [N, 5] left to right in an image of this width."""
    label, left, top, right, bottom = rows.unbind(1)
    return torch.stack([label, width - right, top, width - left, bottom], 1)


def padded(rows: Tensor, most: int) -> dict[str, Tensor]:
    """Returns targets of the task detection: boxes float32 [most, 5], and a mask of the rows that are boxes."""
    boxes = torch.zeros(most, 5)
    boxes[: len(rows)] = rows
    return {"boxes": boxes, "mask": torch.arange(most) < len(rows)}
