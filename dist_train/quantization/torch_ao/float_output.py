"""A Linear with integer weights and floating-point outputs: the head of the models that fx and eager convert."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.quantization.fake_quantize import WeightFakeQuantize


def use_float_outputs(prepared: nn.Module, heads: Iterable[str]) -> None:
    """Replaces the named trained Linears, in place, before torch.ao converts the rest."""
    for name in heads:
        trained = prepared.get_submodule(name)
        assert isinstance(trained, nn.Linear)
        prepared.set_submodule(name, FloatOutputLinear(trained))


class FloatOutputLinear(nn.Module):
    """A Linear with integer weights and float32 outputs: logits should not be rounded to 8 bits.

    One image with logits of 1,000 would make the grid so coarse that the logits of all other images take two or three
    values. Of torch.ao's engines only x86 has a kernel for this. A head is a small part of its model, so its integers
    are multiplied as floating-point numbers.

    Buffers:
        weight: int8 [out_features, in_features].
        scale: float32 [out_features] or [1].
        bias: float32 [out_features], or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, trained: nn.Linear) -> None:
        """trained: with its `weight_fake_quant`, symmetric."""
        super().__init__()
        quantizer, weight = trained.weight_fake_quant, trained.weight.detach()
        assert isinstance(quantizer, WeightFakeQuantize)
        self.register_buffer("weight", quantizer.integers(weight))
        self.register_buffer("scale", quantizer.scale(weight).flatten())
        self.register_buffer("bias", None if trained.bias is None else trained.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """x: quint8 or float32 [..., in_features], on its grid. Float32 [..., out_features]."""
        x = x.dequantize()
        # `type_as` depends on the input: TorchScript would fold a constant conversion and store the weight as float.
        products = F.linear(x, self.weight.type_as(x)) * self.scale
        return products if self.bias is None else products + self.bias
