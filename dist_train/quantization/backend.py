"""What a quantization backend is: it makes a model that trains with fake quantization, and an integer model of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.fx import GraphModule

from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.rules import Rule


@runtime_checkable
class QuantizationBackend(Protocol):
    """Neither method changes what it is given, draws from the global random generator, or communicates."""

    def prepare(self, model: nn.Module, example: Tensor, rules: Sequence[Rule] = ()) -> PreparedModel:
        """Places fake-quantize modules.

        Args:
            model: the float model, on any device, in either mode.
            example: [B, C, H, W] (or what the model takes as its one input); only its shape, dtype and device count.
            rules: what to leave in floating point.

        Raises:
            QuantizationError: the model cannot be quantized this way; names the layer and says what to change.
        """

    def convert(self, prepared: PreparedModel) -> GraphModule:
        """The integer model, on the CPU: weights int8, activations between quantize and dequantize operators."""
