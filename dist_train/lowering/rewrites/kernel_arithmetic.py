"""Scales and zero points that integer kernels need, for the rewriting of ONNX and of programs."""

from __future__ import annotations

from typing import Any

import numpy as np

_LARGEST_BIAS = 2.0**30  # leaves int32 room for the sum of products

Range = tuple[float, float]


def summand_range(sums: Range, others: Range) -> Range:
    """Computes the range of a summand from those of the sum and of the other summand, which are quantized.

    The range is [lowest sum - highest other, highest sum - lowest other]. A value outside of it is clipped in the sum
    anyway, so this range costs one more rounding and no clipping.
    """
    return sums[0] - others[1], sums[1] - others[0]


def scale_and_zero_point(values: Range, low: int, high: int) -> tuple[float, int]:
    """Computes scale and zero point that map a range to the integers low..high."""
    scale = (values[1] - values[0]) / (high - low)
    return scale, int(np.clip(round(low - values[0] / scale), low, high))


def with_room_for_bias(weights: Any, scales: Any, bias: Any, input_scale: float) -> tuple[Any, Any]:
    """Enlarges scales so that `bias` / (input_scale * scale), which kernels add, fits int32.

    This concerns channels with weights that are tiny beside the bias, as after weight decay. The error of such a weight
    is below 1e-3 of the bias, less than a step of the output.

    Returns:
        The weights, int8 [K, ...], and their scales, float32 [K]; the arguments themselves where all biases fit.
    """
    enough = np.maximum(scales, np.abs(bias) / (_LARGEST_BIAS * input_scale)).astype(np.float32)
    if not (enough > scales).any():
        return weights, scales
    ratio = (scales / enough).reshape(-1, *[1] * (weights.ndim - 1))
    return np.round(weights * ratio).astype(weights.dtype), enough
