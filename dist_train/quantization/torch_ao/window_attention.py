"""torchvision's windowed attention (swin) in single operations: torch.fx takes it for one, with its weights in it."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MODULE = "torchvision.models.swin_transformer"


def open_windows(model: nn.Module) -> None:
    """Gives `ShiftedWindowAttention` of either version a forward of single operations, in place.

    `model` is the backend's own copy; names and results stay the same.
    """
    swin = sys.modules.get(_MODULE)  # imported where a model has it
    if swin is None:
        return
    kinds = (swin.ShiftedWindowAttention, swin.ShiftedWindowAttentionV2)
    for module in model.modules():
        if type(module) in kinds:
            # A class of its own for each, so that rules and messages find the type's name.
            module.__class__ = type(type(module).__name__, (_OpenWindows, type(module)), {"__module__": __name__})


class _OpenWindows(nn.Module):
    """The forward of torchvision's `shifted_window_attention`, for a map whose size is known while tracing."""

    window_size: list[int]
    shift_size: list[int]
    num_heads: int
    qkv: nn.Linear
    proj: nn.Linear
    logit_scale: Tensor  # of version 2
    get_relative_position_bias: Any
    relative_position_index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, H, W, C]. Returns the same shape."""
        height, width = x.shape[1], x.shape[2]
        rows, columns = (-(-size // window) for size, window in zip((height, width), self.window_size, strict=True))
        down, right = self.window_size
        padded = (rows * down, columns * right)
        if padded != (height, width):
            x = F.pad(x, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
        # A window as large as the map needs no shift.
        shifts = [
            0 if window >= size else shift
            for shift, window, size in zip(self.shift_size, self.window_size, padded, strict=True)
        ]
        if any(shifts):
            x = torch.roll(x, (-shifts[0], -shifts[1]), (1, 2))
        x = x.unflatten(2, (columns, right)).unflatten(1, (rows, down)).transpose(2, 3)  # [B, rows, columns, ...]
        x = self._attend(x.flatten(3, 4).flatten(1, 2), padded, shifts)
        x = x.unflatten(2, (down, right)).unflatten(1, (rows, columns)).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)
        if any(shifts):
            x = torch.roll(x, (shifts[0], shifts[1]), (1, 2))
        return x[:, :height, :width, :].contiguous()

    def _attend(self, x: Tensor, padded: tuple[int, int], shifts: list[int]) -> Tensor:
        """x: [B, windows, positions, C]. Returns the same shape."""
        q, k, v = (self._heads(each) for each in self._projected(x))
        bias, scale = self.get_relative_position_bias(), None
        if any(shifts):
            bias = bias + self._between_regions(padded, shifts)
        if hasattr(self, "logit_scale"):
            q = F.normalize(q, dim=-1) * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
            k, scale = F.normalize(k, dim=-1), 1.0
        attended = F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
        return self.proj(attended.transpose(-3, -2).flatten(-2))

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias: Tensor | None = self.qkv.bias
        if bias is None or not hasattr(self, "logit_scale"):
            packed = self.qkv(x)
        else:  # version 2 has no bias of keys
            size = bias.shape[0] // 3
            bias = torch.cat([bias[:size], torch.zeros_like(bias[:size]), bias[2 * size :]])
            packed = F.linear(x, self.qkv.weight, bias)
        q, k, v = packed.unflatten(-1, (3, -1)).unbind(-2)  # unpacked here, where torch.fx sees how many there are
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        """[B, windows, positions, C] to [B, windows, heads, positions, C / heads]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def _between_regions(self, padded: tuple[int, int], shifts: list[int]) -> Tensor:
        """Returns -100 between positions of a window that are no neighbors but by rolling: [windows, 1, P, P]."""
        device = self.relative_position_index.device
        regions = torch.zeros(padded, device=device)
        for axis, (size, window, shift) in enumerate(zip(padded, self.window_size, shifts, strict=True)):
            index = torch.arange(size, device=device)
            part = ((index >= size - window).float() + (index >= size - shift).float()) * (shift > 0)
            regions = regions * 3 + (part.unsqueeze(1) if axis == 0 else part)
        down, right = self.window_size
        cut = regions.unflatten(1, (-1, right)).unflatten(0, (-1, down)).transpose(1, 2).flatten(2).flatten(0, 1)
        return ((cut.unsqueeze(1) != cut.unsqueeze(2)).float() * -100.0).unsqueeze(1)
