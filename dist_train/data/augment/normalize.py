"""Normalizes batches of images in one pass, into memory that is used again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_train.data.batch_memory import Buffers
from dist_train.errors import DataError

_PIECE = 2**17
"""Values that are converted at once: few enough to stay in a core's cache for the three operations on them."""


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Returns float32 [C, 1, 1] each, of normalization: (x / 255 - mean) / std = x * scale + shift."""
    scale = torch.tensor([1.0 / (255.0 * s) for s in std], dtype=torch.float32).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32).view(-1, 1, 1)
    return scale, shift


class Normalization:
    """Computes (x / 255 - mean) / std per channel.

    Args:
        mean, std: per channel, for pixels on the scale 0..1.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._scale, self._shift = scale_and_shift(mean, std)
        self._buffers = Buffers()

    def __call__(self, images: Tensor) -> Tensor:
        """Returns float32 [B, C, H, W] of images uint8 or float32, in their memory format; does not change them.

        Raises:
            DataError: the images have another number of channels than mean and std.
        """
        if images.dim() != 4:
            raise DataError(
                f"uint8 inputs are images [C, H, W], not {list(images.shape[1:])}",
                "return .long() for ids, .bool() for a mask, or .float() for numbers",
            )
        if images.shape[1] != len(self._scale):
            raise DataError(
                f"images have {images.shape[1]} channels, but Splits.mean and Splits.std "
                f"have {len(self._scale)} values",
                "give one mean and one std for each channel",
            )
        # Multiply, then add: the number of roundings of a fused operation depends on kernel and device.
        if images.device.type == "cpu" and images.numel() > _PIECE and len(images) > 1:
            return self._in_pieces(images)
        scale, shift = self._scale.to(images.device), self._shift.to(images.device)
        # A product of bytes and floats takes longer than these two operations.
        scaled = images.to(torch.float32).mul_(scale) if images.dtype == torch.uint8 else torch.mul(images, scale)
        return scaled.add_(shift)

    def _in_pieces(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        buffer = self._buffers.take(images.numel())
        scale, shift = self._scale, self._shift
        if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
            # Rows of pixels with their channels: repeated along a row, the factors are one vector like the values.
            result = buffer.view(batch, height, width, channels).permute(0, 3, 1, 2)
            given, made = (each.permute(0, 2, 3, 1).view(batch, height, width * channels) for each in (images, result))
            scale, shift = (each.view(channels).repeat(width) for each in (scale, shift))
        else:
            result = made = buffer.view(batch, channels, height, width)
            given = images
        rows = max(1, _PIECE // given[0].numel())
        for part, values in zip(made.split(rows), given.split(rows), strict=True):
            part.copy_(values).mul_(scale).add_(shift)
        return result
