"""Mixup and cutmix: the same pixels at any world size, because draws and partners belong to the global batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from dist_train.config.data import MixConfig
from dist_train.data.permutation import derive_key
from dist_train.errors import DataError


@dataclass(frozen=True)
class Draw:
    """Random choices for one step.

    Attributes:
        cutmix: cutmix, else mixup.
        weight: share of a row's own pixels.
        centre: of cutmix's box, row and column in 0..1.
    """

    cutmix: bool
    weight: float
    centre: tuple[float, float]


class Mix:
    """Mixes rows with partners; the draws are a function of (seed, epoch, step) alone.

    Mixup: Zhang et al. 2018, arXiv:1710.09412, equation 1, with one weight per batch as in the authors' program.
    Cutmix: Yun et al. 2019, arXiv:1905.04899, section 3.1. The box is clipped at the image's edge, and the weight is
    the share of the remaining pixels.
    """

    extra_rows = 1

    def __init__(self, settings: MixConfig, seed: int) -> None:
        self._settings = settings
        self._seed = seed

    def draw(self, epoch: int, step: int) -> Draw | None:
        """Draws the mixing of a step; None: the step is not mixed."""
        settings = self._settings
        generator = np.random.Generator(np.random.Philox(derive_key("mix", self._seed, epoch, step)))
        chance, choice, top, left = generator.random(4).tolist()
        if chance >= settings.p:
            return None
        cutmix = settings.cutmix > 0 and (settings.mixup == 0 or choice < 0.5)
        alpha = settings.cutmix if cutmix else settings.mixup
        return Draw(cutmix, float(generator.beta(alpha, alpha)), (top, left))

    def __call__(
        self, inputs: torch.Tensor, partners: torch.Tensor, targets: torch.Tensor, epoch: int, step: int
    ) -> tuple[torch.Tensor, float] | None:
        """Returns mixed inputs and the weight of a row's own target; None where the step is not mixed.

        Args:
            inputs: float [B, ...]; left as they are.
            partners: like `inputs`; row n is mixed into row n.
            targets: of the inputs; cutmix needs targets that describe the whole image.

        Raises:
            DataError: cutmix of inputs other than images [B, C, H, W] with one target each.
        """
        draw = self.draw(epoch, step)
        if draw is None:
            return None
        if not draw.cutmix:
            return inputs * draw.weight + partners * (1 - draw.weight), draw.weight
        if inputs.dim() != 4 or targets.dim() > 2:
            raise DataError(
                f"cutmix is for images [B, C, H, W] with one target each, not for inputs {list(inputs.shape)} "
                f"with targets {list(targets.shape)}",
                "--data.mix.cutmix 0; --data.mix.mixup 0.2 takes any shape",
            )
        height, width = inputs.shape[2:]
        top, bottom, left, right = _box(draw, height, width)
        mixed = inputs.clone()
        mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
        return mixed, 1 - (bottom - top) * (right - left) / (height * width)


class NoMix:
    """Mixes nothing."""

    extra_rows = 0

    def __call__(
        self, inputs: torch.Tensor, partners: torch.Tensor, targets: torch.Tensor, epoch: int, step: int
    ) -> tuple[torch.Tensor, float] | None:
        return None


def _box(draw: Draw, height: int, width: int) -> tuple[int, int, int, int]:
    """Edges of the box in pixels: (top, bottom, left, right)."""
    side = math.sqrt(1 - draw.weight)
    edges = []
    for size, centre in ((height, draw.centre[0]), (width, draw.centre[1])):
        middle, half = int(centre * size), int(side * size) // 2
        edges += [max(0, middle - half), min(size, middle + half)]
    return edges[0], edges[1], edges[2], edges[3]
