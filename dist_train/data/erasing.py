"""Random erasing of rectangles, batched: a function of (seed, epoch, sample id) alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TRIES = 10  # rectangles that are drawn until one fits, as in torchvision
_LEVELS = 1024  # of the ratio


class RandomErasing:
    """A rectangle becomes the mean of the data, with probability p (Zhong et al. 2020, arXiv:1708.04896, algorithm 1).

    Its area is uniform in `scale` times the image's, its ratio of height to width log-uniform in `ratio`; the first of ten such
    rectangles that fits into the image is placed uniformly. An image that none fits is left alone.
    """

    draws = ("erase", *(f"{name}{attempt}" for attempt in range(_TRIES) for name in ("area", "ratio")), "top", "left")

    def __init__(self, settings: Any, mean: Sequence[float]) -> None:
        self.p: float = settings.p
        self.scale: tuple[float, float] = settings.scale
        # From a table: the last bit of an exponential may depend on where in a batch the sample is.
        low, high = np.log(settings.ratio)
        levels = np.exp(low + (high - low) * (np.arange(_LEVELS) + 0.5) / _LEVELS)
        self._roots = torch.from_numpy(np.sqrt(levels).astype(np.float32))
        self._fill = torch.tensor([255.0 * each for each in mean], dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, images: Tensor, *draws: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        erase, *rest, top, left = draws
        areas, ratios = torch.stack(rest[0::2]), torch.stack(rest[1::2])
        least, most = self.scale
        sides = ((areas * (most - least) + least) * (height * width)).sqrt()
        roots = self._roots.to(images.device)[(ratios * _LEVELS).long()]
        heights, widths = (sides * roots).round().long(), (sides / roots).round().long()
        fits = (heights < height) & (widths < width)
        first = fits.long().argmax(0, keepdim=True)
        chosen = (erase < self.p) & fits.any(0)
        tall, wide = heights.gather(0, first)[0], widths.gather(0, first)[0]
        rows = _inside(tall, top, height)
        columns = _inside(wide, left, width)
        hole = (chosen.view(batch, 1, 1) & rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)
        return torch.where(hole, self._fill.to(images.device), images.to(torch.float32))


def _inside(length: Tensor, draw: Tensor, size: int) -> Tensor:
    """Which of `size` places lie in a stretch of `length` [B], placed by `draw` in [0, 1): bool [B, size]."""
    # In double, where the product cannot round up to the number of places.
    start = (draw.double() * (size - length + 1)).long().unsqueeze(1)
    place = torch.arange(size, device=length.device)
    return (place >= start) & (place < start + length.unsqueeze(1))
