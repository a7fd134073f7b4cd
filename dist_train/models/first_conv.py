"""Adapts a network to images with another number of channels."""

from __future__ import annotations

import torch
from torch import nn


def replace_first_conv(model: nn.Module, in_channels: int) -> None:
    """Replaces the first 2-d convolution by a fresh one with `in_channels`, unless it has that many already.

    Raises:
        ValueError: the model has no 2-d convolution.
    """
    found = first_conv(model)
    if found is None:
        raise ValueError("the model has no Conv2d that could take other channels")
    name, conv = found
    if conv.in_channels == in_channels:
        return
    fresh = nn.Conv2d(
        in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, fresh)


def first_conv(model: nn.Module) -> tuple[str, nn.Conv2d] | None:
    """Finds the first 2-d convolution, in the order in which modules were added; None where there is none."""
    return next(((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)), None)


def fit_channels(weight: torch.Tensor, in_channels: int) -> torch.Tensor:
    """Fits a convolution's weight [O, I, kH, kW] to another number of channels: [O, in_channels, kH, kW].

    One channel: the sum over the input channels, so a gray image gives the same outputs as in three equal channels.
    Otherwise: the channels in turn, scaled by I / in_channels, so that activations keep their size. timm does the same.
    """
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    turns = torch.arange(in_channels) % weight.shape[1]
    return weight[:, turns] * (weight.shape[1] / in_channels)
