"""Crops, mirrors and changes one image, drawn as by torchvision's transforms v2, into a row of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from dist_train.config.data import RandAugment, RandomHorizontalFlip, RandomResizedCrop
from dist_train.data.image_file import centre

_TRIES = 10  # rectangles drawn until one fits, as in torchvision
_Box = tuple[int, int, int, int]  # top, left, height, width
_scale_into = torch.ops.aten._upsample_bilinear2d_aa.out


class ImageSteps:
    """The leading steps of data.augment, for one image.

    The numbers are drawn as torchvision draws them, from torch's CPU generator: with one seed, the pixels are the same.
    Its transforms themselves take longer for their bookkeeping than for a flip.

    Args:
        steps: entries of data.augment that workers apply.
        size: pixels of an input's edge.
        resize: pixels of the shorter edge before the centre is cut out, where there is no random_resized_crop.
    """

    def __init__(self, steps: Sequence[Any], size: int, resize: int) -> None:
        self._size, self._resize = size, resize
        self._crop = next((Crop(step) for step in steps if isinstance(step, RandomResizedCrop)), None)
        self._rest = [_rest(step) for step in steps if not isinstance(step, RandomResizedCrop)]
        self._draws = bool(steps)

    def centre(self, image: Tensor, out: Tensor) -> None:
        """Writes an image as it is evaluated: its shorter edge is scaled to `resize`, and the centre is cut out."""
        out.copy_(centre(image, self._size, self._size, self._resize))

    def augmented(self, image: Tensor, seed: int, out: Tensor) -> None:
        """Writes an image [3, H, W] to `out`, uint8 [3, size, size], augmented as a function of `seed` alone."""
        if self._draws:
            # The steps draw from torch's CPU generator alone; seeding all generators costs as much as the flip.
            torch.default_generator.manual_seed(seed)
        if self._crop is None:
            self.centre(image, out)
        else:
            top, left, height, width = self._crop.box(*image.shape[1:])
            scale_into(image[:, top : top + height, left : left + width], out)
        for step in self._rest:
            if isinstance(step, float):
                if torch.rand(1) < step:
                    out.copy_(out.flip(-1))
            else:
                out.copy_(step(out.contiguous()))


def _rest(step: Any) -> float | v2.Transform:
    """Returns the probability of a flip, or a transform."""
    if isinstance(step, RandAugment):
        return v2.RandAugment(num_ops=step.num_ops, magnitude=step.magnitude)
    assert isinstance(step, RandomHorizontalFlip)
    return float(step.p)


class Crop:
    """The rectangle of torchvision's RandomResizedCrop."""

    def __init__(self, step: RandomResizedCrop) -> None:
        self._scale, self._ratio = step.scale, step.ratio
        self._log_ratio = torch.log(torch.tensor(step.ratio)).tolist()

    def box(self, height: int, width: int) -> _Box:
        area = height * width
        for _ in range(_TRIES):
            target = area * torch.empty(1).uniform_(*self._scale).item()
            ratio = torch.exp(torch.empty(1).uniform_(*self._log_ratio)).item()
            wide, tall = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < wide <= width and 0 < tall <= height:
                top = int(torch.randint(0, height - tall + 1, (1,)).item())
                return top, int(torch.randint(0, width - wide + 1, (1,)).item()), tall, wide
        wide, tall = width, height
        if width / height < min(self._ratio):
            tall = round(width / min(self._ratio))
        elif width / height > max(self._ratio):
            wide = round(height * max(self._ratio))
        return (height - tall) // 2, (width - wide) // 2, tall, wide


def scale_into(image: Tensor, out: Tensor) -> None:
    """Scales an image [3, h, w] to the size of `out`, bilinear with antialiasing, as torchvision's resize does."""
    if image.shape == out.shape:
        out.copy_(image)
    else:
        _scale_into(image.unsqueeze(0), out.shape[1:], False, out=out.unsqueeze(0))
