"""Fake quantization: activations with ranges that lag one step, weights whose scale always follows them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.errors import QuantizationError
from dist_train.quantization.byte_masks import equal

# A range of zero width still needs a scale that can be inverted in float32.
SMALLEST_SCALE = 1e-12


class _QuantizeDequantize(torch.autograd.Function):
    """x -> (clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale, with the straight-through estimator.

    The gradient passes where x was not clipped (Jacob et al., https://arxiv.org/abs/1712.05877), which a byte per activation remembers.
    Arithmetic is that of `quantized_decomposed.quantize_per_tensor`, in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        q = torch.round(x.float() * (1.0 / scale)) + zero_point
        clamped = torch.clamp(q, low, high)
        ctx.save_for_backward(equal(q, clamped))
        return ((clamped - zero_point) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside.to(grad.dtype), None, None, None, None


class _QuantizeDequantizeWeight(torch.autograd.Function):
    """Nothing is clipped by more than rounding, as the scale comes from the weight itself: the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        q = torch.clamp(torch.round(weight.float() * (1.0 / scale)) + zero_point, low, high)
        return ((q - zero_point) * scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad, None, None, None, None


def affine_parameters(low: Tensor, high: Tensor, quant_min: Tensor, quant_max: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of ranges widened to contain 0, which padding needs to be exact (arXiv:1712.05877, section 2.1).

    All of one shape or broadcast; float32. The zero points are integral.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=SMALLEST_SCALE)
    zero_point = torch.clamp(quant_min - torch.round(low / scale), quant_min, quant_max)
    return scale, zero_point


def symmetric_parameters(low: Tensor, high: Tensor, quant_min: Tensor, quant_max: Tensor) -> tuple[Tensor, Tensor]:
    """As `affine_parameters`, with the range widened to as much below 0 as above, and 0 at the middle integer.

    The lowest integer stays unused: the grid is then the same on both sides (arXiv:1806.08342, section 2.2).
    """
    steps = torch.div(quant_max - quant_min, 2, rounding_mode="floor")
    scale = (torch.maximum(-low, high).clamp(min=0) / steps).clamp(min=SMALLEST_SCALE)
    return scale, quant_max - steps


class _FakeQuantize(nn.Module):
    """Base of both kinds. Each backend registers them with its library's own base, which it finds them by."""

    is_dynamic = False
    activation_post_process: Any  # given by torch_ao, whose library reads bounds from it

    @classmethod
    def with_args(cls, **settings: Any) -> Callable[[], nn.Module]:
        """A constructor without arguments, as torchao asks for."""
        return functools.partial(cls, **settings)


class ActivationFakeQuantize(_FakeQuantize):
    """Per-tensor uint8, affine or symmetric, whose range was known before this step ("delayed ranges").

    While `observing`, a forward also records the minimum and maximum of its input in `step_low` and `step_high`, merged over
    micro-batches and over every place that shares the module. No output depends on them, so that torch.compile can fuse
    quantization into its neighbours; `dist_train.quantization.ranges.Ranges` folds them in between steps.
    Until a range is known, and while `enabled` is False, the input is returned itself.

    Buffers, float32 scalars: low, high, scale, zero_point (integral); `initialized` is a bool. The step's are not persistent.

    Args:
        quant_min, quant_max: 0 and 2 ** bits - 1.
        qscheme: torch.per_tensor_affine, or torch.per_tensor_symmetric.
        range_max: the integer that the top of the range is mapped to, where that is below `quant_max`. x86's integer kernels add
            pairs of products in int16, which saturates without VNNI unless activations stay within 0..127 ("reduce_range" in
            torch.ao). The kernels themselves clamp at `quant_max`, and so does this module.
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
        # Mirrors `initialized` where Python branches: reading the buffer would synchronise the device and break the graph.
        self.calibrated = False
        for name, value in {"low": 0.0, "high": 0.0, "scale": 1.0, "zero_point": 0.0}.items():
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("step_low", torch.tensor(float("inf")), persistent=False)
        self.register_buffer("step_high", torch.tensor(float("-inf")), persistent=False)

    @property
    def symmetric(self) -> bool:
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
        """What a converter asks for: scale float32 [1] and zero point int32 [1].

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
        return f"{self.quant_min}..{self.quant_max}, observing={self.observing}, enabled={self.enabled}, calibrated={self.calibrated}"


class WeightFakeQuantize(_FakeQuantize):
    """Signed integers, per output channel or per tensor, whose range is that of the weight as it is now, so there is no state.

    Symmetric: the scale is max|w| / quant_max and the lowest integer stays unused: the largest weight is then exactly
    representable and nothing is clipped. Affine: the smallest and the largest weight take the ends, and 0 a zero point.

    Args:
        quant_min, quant_max: -2 ** (bits - 1) and 2 ** (bits - 1) - 1.
        qscheme: torch.per_channel_symmetric, per_tensor_symmetric, per_channel_affine or per_tensor_affine.
        settle_in_forward: each forward settles; torch.ao's converters call the module with the final weight, then ask it.
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
        return self.qscheme in (torch.per_tensor_symmetric, torch.per_tensor_affine)

    def scale(self, weight: Tensor) -> Tensor:
        """weight: [out_channels, ...]. Float32 [out_channels, 1, ...]; [1, 1, ...] per tensor."""
        return self.parameters_of(weight)[0]

    def parameters_of(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight: [out_channels, ...]. Scale and zero point, float32 [out_channels, 1, ...]; [1, 1, ...] per tensor."""
        values = weight.detach().float()
        dims = tuple(range(0 if self.per_tensor else 1, weight.dim()))
        if self.qscheme in (torch.per_channel_symmetric, torch.per_tensor_symmetric):
            scale = (values.abs().amax(dims, keepdim=True) / self.quant_max).clamp(min=SMALLEST_SCALE)
            return scale, torch.zeros_like(scale)
        low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
        ends = (torch.full_like(low, float(end)) for end in (self.quant_min, self.quant_max))
        return affine_parameters(low, high, *ends)

    def forward(self, weight: Tensor) -> Tensor:
        """weight: [out_channels, ...], a parameter or what batch normalization's folding makes of it. Same shape and dtype out."""
        if self._settle_in_forward:
            self.settle(weight)
        if not self.enabled:
            return weight
        return _QuantizeDequantizeWeight.apply(weight, *self.parameters_of(weight), self.quant_min, self.quant_max)

    def integers(self, weight: Tensor) -> Tensor:
        """weight: [out_channels, ...]. Int8 of the same shape, what `forward` simulates."""
        scale, zero_point = self.parameters_of(weight)
        steps = torch.round(weight.detach().float() * (1.0 / scale)) + zero_point
        return torch.clamp(steps, self.quant_min, self.quant_max).to(torch.int8)

    def settle(self, weight: Tensor) -> None:
        """Before convert: the weight is final, keep its scale for `calculate_qparams`. Needs no forward to have run."""
        self._final = self.parameters_of(weight)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """What a converter asks for: scale float32 and zero point int64, [out_channels]; [1] per tensor."""
        assert self._final is not None, "settle() comes before convert"
        scale, zero_point = self._final
        return scale.flatten(), zero_point.flatten().to(torch.int64)

    def extra_repr(self) -> str:
        granularity = "tensor" if self.per_tensor else "channel"
        return f"{self.quant_min}..{self.quant_max} per {granularity}, enabled={self.enabled}"
