"""Input of `export.input: uint8`: an artifact's programs take pixels, and normalize them inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.data.augment.normalize import scale_and_shift
from dist_train.errors import DataError

_OFF_GRID = 0.01  # of a pixel's step: rounding of float32 is 100 times less, and other numbers are anywhere


class _Normalizing(nn.Module):
    """Normalizes uint8 images as the data's loader does, with the same operations, then runs a model."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> Tensor:
        """Takes uint8 [B, C, H, W]."""
        outputs: Tensor = self.model(images.to(torch.float32) * self.scale + self.shift)
        return outputs


class PixelInput:
    """The normalization of images of one shape, as a part of a program."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], shape: Sequence[int]) -> None:
        """Takes mean and std per channel, for pixels on the scale 0..1, and the shape [C, H, W]."""
        self.shape = tuple(shape)
        self._scale, self._shift = scale_and_shift(mean, std)

    def before(self, model: nn.Module) -> nn.Module:
        """Returns a module that takes uint8 [B, C, H, W] and gives the outputs of `model` for the normalized images."""
        module = _Normalizing(model, self._scale, self._shift)
        module.training = False  # eval() would ask an exported program too, which refuses it
        return module

    def normalized(self, pixels: Tensor) -> Tensor:
        """Returns the normalized images of uint8 ones, as the data's loader gives them."""
        return pixels.to(torch.float32) * self._scale + self._shift

    def example(self, rows: int) -> Tensor:
        """Returns images of zeros."""
        return torch.zeros(rows, *self.shape, dtype=torch.uint8)

    def drawn(self, rows: int, seed: int) -> Tensor:
        """Returns images of random pixels."""
        return torch.randint(256, (rows, *self.shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)

    def pixels(self, inputs: Tensor) -> Tensor:
        """Returns the uint8 images that were normalized to `inputs`, float32 [B, C, H, W] on the CPU.

        Raises:
            DataError: these are no normalized images of pixels.
        """
        values = (inputs - self._shift) / self._scale
        rounded = values.round()
        if not bool(((values - rounded).abs() < _OFF_GRID).all() and (rounded >= 0).all() and (rounded <= 255).all()):
            raise DataError(
                "the model takes uint8 images, and the data gives other numbers than normalized pixels",
                "give data of uint8 images; or a model that was exported with --export.input float",
            )
        return rounded.to(torch.uint8)


def pixel_input(described: Mapping[str, Any], dtype: str) -> PixelInput | None:
    """Returns the input of programs that take `dtype`; None for float32, which the caller normalizes.

    described: the data, from `describe_data`.
    """
    if dtype != "uint8":
        return None
    return PixelInput(described["mean"], described["std"], described["input_shape"])
