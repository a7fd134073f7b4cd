"""Fake quantization of activations, with ranges from earlier steps, and of weights, with ranges of their values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.errors import QuantizationError
from dist_train.quantization.byte_masks import equal_mask

# A range of zero width needs a scale too, and one that can be inverted in float32.
SMALLEST_SCALE = 1e-12


class _QuantizeDequantize(torch.autograd.Function):
    """x -> (clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale, with the straight-through estimator.

    The gradient passes where x was not clipped (Jacob et al., https://arxiv.org/abs/1712.05877); a byte mask is saved.
    The arithmetic equals `quantized_decomposed.quantize_per_tensor`, in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        q = torch.round(x.float() * (1.0 / scale)) + zero_point
        clamped = torch.clamp(q, low, high)
        ctx.save_for_backward(equal_mask(q, clamped))
        return ((clamped - zero_point) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside.to(grad.dtype), None, None, None, None


class _QuantizeDequantizeWeight(torch.autograd.Function):
    """As above, but the gradient is unchanged: the scale comes from the weight, so that only rounding clips."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        q = torch.clamp(torch.round(weight.float() * (1.0 / scale)) + zero_point, low, high)
        return ((q - zero_point) * scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad, None, None, None, None


def affine_parameters(low: Tensor, high: Tensor, quant_min: Tensor, quant_max: Tensor) -> tuple[Tensor, Tensor]:
    """Computes scales and zero points of ranges, widened to contain 0.

    Padding with zeros is then exact (arXiv:1712.05877, section 2.1). All tensors are float32, of one shape or
    broadcast. The zero points are integral.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=SMALLEST_SCALE)
    zero_point = torch.clamp(quant_min - torch.round(low / scale), quant_min, quant_max)
    return scale, zero_point


def symmetric_parameters(low: Tensor, high: Tensor, quant_min: Tensor, quant_max: Tensor) -> tuple[Tensor, Tensor]:
    """As `affine_parameters`, with ranges widened to be symmetric about 0, which is the middle integer.

    The lowest integer is not used, so that the grid is equal on both sides (arXiv:1806.08342, section 2.2).
    """
    steps = torch.div(quant_max - quant_min, 2, rounding_mode="floor")
    scale = (torch.maximum(-low, high).clamp(min=0) / steps).clamp(min=SMALLEST_SCALE)
    return scale, quant_max - steps


class _FakeQuantize(nn.Module):
    """Base of both kinds. Each backend registers them with its library's own base, by which the library finds them."""

    is_dynamic = False
    activation_post_process: Any  # set by torch_ao, whose library reads bounds from it

    @classmethod
    def with_args(cls, **settings: Any) -> Callable[[], nn.Module]:
        """Returns a constructor without arguments, which torchao asks for."""
        return functools.partial(cls, **settings)


class ActivationFakeQuantize(_FakeQuantize):
    """Per-tensor uint8 fake quantization, affine or symmetric, with a range from before this step ("delayed ranges").

    While `observing`, a forward also records the minimum and maximum of its input in `step_low` and `step_high`. They
    cover all micro-batches and all calls of the module. No output depends on them, so that torch.compile can fuse
    quantization into its neighbors. `dist_train.quantization.ranges.Ranges` updates the range from them between steps.
    The input is returned unchanged until a range is known, and while `enabled` is False.

    Args:
        quant_min, quant_max: 0 and 2 ** bits - 1.
        qscheme: torch.per_tensor_affine, or torch.per_tensor_symmetric.
        range_max: the integer of the range's high end, where it is below `quant_max`: 127 for x86's integer kernels.
            They add pairs of products in int16. Without VNNI this saturates unless activations stay within 0..127
            ("reduce_range" in torch.ao). The kernels clamp at `quant_max`, and so does this module.

    Buffers:
        low, high, scale, zero_point: float32 scalars; the zero point is integral.
        initialized: bool scalar, True when a range is known.
        step_low, step_high: float32 scalars, not persistent.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    zero_point: Tensor
    initialized: Tensor
    step_low: Tensor
    step_high: Tensor

    def __init__(
        self,
        dtype: torch.dtype = torch.uint8,
        quant_min: int = 0,
        quant_max: int = 255,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        is_dynamic: bool = False,
        range_max: int | None = None,
    ) -> None:
        super().__init__()
        self.dtype, self.qscheme, self.quant_min, self.quant_max = dtype, qscheme, quant_min, quant_max
        self.range_max = quant_max if range_max is None else range_max
        self.observing = True
        self.enabled = True
        # Mirrors `initialized` for branches: reading the buffer would synchronize the device and break the graph.
        self.calibrated = False
        for name, value in {"low": 0.0, "high": 0.0, "scale": 1.0, "zero_point": 0.0}.items():
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("step_low", torch.tensor(float("inf")), persistent=False)
        self.register_buffer("step_high", torch.tensor(float("-inf")), persistent=False)

    @property
    def symmetric(self) -> bool:
        """True for a symmetric scheme."""
        return self.qscheme == torch.per_tensor_symmetric

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape, float32, bfloat16 or float16. Returns the same shape and dtype."""
        if self.observing:
            seen = x.detach()
            self.step_low.copy_(torch.minimum(self.step_low, seen.amin().float()))
            self.step_high.copy_(torch.maximum(self.step_high, seen.amax().float()))
        if not (self.enabled and self.calibrated):
            return x
        return _QuantizeDequantize.apply(x, self.scale, self.zero_point, self.quant_min, self.quant_max)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Returns scale, float32 [1], and zero point, int32 [1], for converters.

        Raises:
            QuantizationError: no range is known yet.
        """
        if not self.calibrated:
            raise QuantizationError(
                "an activation has no range yet: its fake-quantize module has never been given one",
                "calibrate before converting: put ptq before convert in `stages`",
            )
        return self.scale.view(1), self.zero_point.view(1).int()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.calibrated = bool(self.initialized)

    def extra_repr(self) -> str:
        state = f"observing={self.observing}, enabled={self.enabled}, calibrated={self.calibrated}"
        return f"{self.quant_min}..{self.quant_max}, {state}"


class NarrowActivationFakeQuantize(ActivationFakeQuantize):
    """ActivationFakeQuantize whose range ends at 127, for integer kernels that add products in int16."""

    def __init__(self, *, quant_max: int = 255, **settings: Any) -> None:
        super().__init__(quant_max=quant_max, range_max=min(127, quant_max), **settings)


class WeightFakeQuantize(_FakeQuantize):
    """Fake quantization of weights to signed integers, per output channel or per tensor.

    The range comes from the weight's present values, so there is no state. Symmetric schemes have the scale
    max|w| / quant_max, and the lowest integer is not used: the largest weight is exact and nothing is clipped. Affine
    schemes map the smallest and the largest weight to the ends.

    Args:
        quant_min, quant_max: -2 ** (bits - 1) and 2 ** (bits - 1) - 1.
        qscheme: torch.per_channel_symmetric, per_tensor_symmetric, per_channel_affine or per_tensor_affine.
        settle_in_forward: each forward calls `settle`. torch.ao's converters call the module with the final weight,
            then read its parameters.
    """

    ch_axis = 0

    def __init__(
        self,
        dtype: torch.dtype = torch.int8,
        quant_min: int = -128,
        quant_max: int = 127,
        qscheme: torch.qscheme = torch.per_channel_symmetric,
        is_dynamic: bool = False,
        settle_in_forward: bool = False,
    ) -> None:
        super().__init__()
        self.dtype, self.qscheme, self.quant_min, self.quant_max = dtype, qscheme, quant_min, quant_max
        self._settle_in_forward = settle_in_forward
        self.enabled = True
        self._final: tuple[Tensor, Tensor] | None = None

    @property
    def per_tensor(self) -> bool:
        """True for one scale of the whole weight."""
        return self.qscheme in (torch.per_tensor_symmetric, torch.per_tensor_affine)

    def scale(self, weight: Tensor) -> Tensor:
        """Returns the scale, as `parameters_of`."""
        return self.parameters_of(weight)[0]

    def parameters_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Computes scale and zero point, float32 [out_channels, 1, ...], or [1, 1, ...] per tensor.

        weight: [out_channels, ...].
        """
        values = weight.detach().float()
        dims = tuple(dim for dim in range(weight.dim()) if self.per_tensor or dim != self.ch_axis)
        if self.qscheme in (torch.per_channel_symmetric, torch.per_tensor_symmetric):
            scale = (values.abs().amax(dims, keepdim=True) / self.quant_max).clamp(min=SMALLEST_SCALE)
            return scale, torch.zeros_like(scale)
        low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
        ends = (torch.full_like(low, float(end)) for end in (self.quant_min, self.quant_max))
        return affine_parameters(low, high, *ends)

    def forward(self, weight: Tensor) -> Tensor:
        """weight: [out_channels, ...], with or without a batch norm folded in. Returns the same shape and dtype."""
        if self._settle_in_forward:
            self.settle(weight)
        if not self.enabled:
            return weight
        return _QuantizeDequantizeWeight.apply(weight, *self.parameters_of(weight), self.quant_min, self.quant_max)

    def integers(self, weight: Tensor) -> Tensor:
        """Returns the integers that `forward` simulates, int8 of the same shape. weight: [out_channels, ...]."""
        scale, zero_point = self.parameters_of(weight)
        steps = torch.round(weight.detach().float() * (1.0 / scale)) + zero_point
        return torch.clamp(steps, self.quant_min, self.quant_max).to(torch.int8)

    def settle(self, weight: Tensor) -> None:
        """Keeps the scale of the final weight for `calculate_qparams`, before convert. No forward need have run."""
        self._final = self.parameters_of(weight)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Returns scale, float32, and zero point, int64, [out_channels], or [1] per tensor, for converters."""
        assert self._final is not None, "settle() comes before convert"
        scale, zero_point = self._final
        return scale.flatten(), zero_point.flatten().to(torch.int64)

    def extra_repr(self) -> str:
        granularity = "tensor" if self.per_tensor else "channel"
        return f"{self.quant_min}..{self.quant_max} per {granularity}, enabled={self.enabled}"


class TransposedWeightFakeQuantize(WeightFakeQuantize):
    """WeightFakeQuantize for transposed convolutions: weights and scales are [in_channels, out_channels, ...]."""

    ch_axis = 1
