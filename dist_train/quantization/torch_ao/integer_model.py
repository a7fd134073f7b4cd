"""Integer model of the fx and eager backends, and its serialization."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import nn

from dist_train import trees
from dist_train.errors import QuantizationError
from dist_train.programs.program import Program
from dist_train.programs.signature import Dynamic
from dist_train.programs.torchscript import integer_kernels, script_bytes, trace
from dist_train.quantization.dry_run import GRADIENT_BOUND
from dist_train.quantization.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize
from dist_train.quantization.torch_ao.common import choose_engine
from dist_train.trees import Tree

STATE = "state_dict.pt"


class IntegerModel(nn.Module):
    """A model that torch.ao converted, run with the kernels that its weights are packed for."""

    def __init__(self, model: nn.Module, engine: str) -> None:
        """
        Args:
            model: on the CPU.
            engine: see `dist_train.programs.torchscript.integer_kernels`.

        Raises:
            QuantizationError: fake quantization is left in the model.
        """
        super().__init__()
        left = [
            name
            for name, module in model.named_modules()
            if isinstance(module, (ActivationFakeQuantize, WeightFakeQuantize))
        ]
        if left:
            raise QuantizationError(f"convert left {left[0]} unconverted", "report this as a bug")
        self.model = model.requires_grad_(False).eval()
        self.engine = engine

    def forward(self, *args: Any, **kwargs: Any) -> Tree:
        """Takes inputs [B, ...] on the CPU as the float model takes them, and returns as it."""
        with integer_kernels(self.engine):
            return self.model(*args, **kwargs)


class TorchAOBackend:
    """Base of the fx and eager backends: the engine, and serialization to TorchScript."""

    def __init__(
        self, engine: str = "auto", gradient_bound: float = GRADIENT_BOUND, dynamic: Dynamic | None = None
    ) -> None:
        """
        Args:
            engine: as `qat.engine`.
            gradient_bound: as `qat.gradient_bound`, for `check`.
            dynamic: dimensions of the inputs that vary besides the batch.

        Raises:
            QuantizationError: this torch does not have its kernels.
        """
        self.engine = choose_engine(engine)
        self.gradient_bound = gradient_bound
        self.dynamic = dynamic

    def serialize(self, converted: nn.Module, example: Tree) -> Program:
        """See QuantizationBackend.serialize. A state_dict for `torch.load(..., weights_only=True)` is an extra file."""
        assert isinstance(converted, IntegerModel)
        state = io.BytesIO()
        torch.save(converted.model.state_dict(), state)
        with integer_kernels(converted.engine):
            script = trace(converted.model, trees.map_leaves(lambda leaf: leaf.cpu(), example))
            data = script_bytes(script, converted.engine)
        return Program("torchscript", data, {STATE: state.getvalue()})
