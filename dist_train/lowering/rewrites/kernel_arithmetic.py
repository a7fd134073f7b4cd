"""What integer kernels want of a quantized graph, in numbers: shared by the rewriting of ONNX and of programs."""

from __future__ import annotations

from typing import Any

import numpy as np

_LARGEST_BIAS = 2.0**30  # leaves int32 room for the sum of products

Range = tuple[float, float]


def summand_range(sums: Range, others: Range) -> Range:
    """The range of a summand whose sum is quantized and whose other summand is, too; no range has to be learned.

    What lies outside of [lowest sum - highest other, highest sum - lowest other] is clipped in the sum too, whatever the other
    summand is, so that this range clips nothing that counts. What it costs is one more rounding.
    """
    return sums[0] - others[1], sums[1] - others[0]


def scale_and_zero_point(values: Range, low: int, high: int) -> tuple[float, int]:
    """Those by which the integers low..high stand for the range."""
    scale = (values[1] - values[0]) / (high - low)
    return scale, int(np.clip(round(low - values[0] / scale), low, high))


def with_room_for_bias(weights: Any, scales: Any, bias: Any, input_scale: float) -> tuple[Any, Any]:
    """Weights [K, ...] in int8 and their scales, float32 [K], such that `bias` / (input_scale * scale) fits int32, as kernels add it.

    Where a channel's weight is so small beside its bias that this would overflow (a channel that weight decay emptied), the
    channel's scale becomes larger; what its weight then loses is below 1e-3 of the bias, less than a step of the output.
    """
    enough = np.maximum(scales, np.abs(bias) / (_LARGEST_BIAS * input_scale)).astype(np.float32)
    if not (enough > scales).any():
        return weights, scales
    ratio = (scales / enough).reshape(-1, *[1] * (weights.ndim - 1))
    return np.round(weights * ratio).astype(weights.dtype), enough
