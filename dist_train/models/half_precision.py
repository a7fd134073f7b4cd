"""Half precision: a model in bf16 or fp16, with float32 inputs and outputs."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from dist_train.errors import DataError, first_line

Dtype = Literal["bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CPU_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")  # the last one is ARM's


class HalfModel(nn.Module):
    """A copy of `model` with floating-point parameters and buffers in `dtype`; takes and returns float32."""

    def __init__(self, model: nn.Module, dtype: Dtype) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False).to(_DTYPES[dtype])
        self.dtype = _DTYPES[dtype]

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns float32; inputs are float32, as for the float model."""
        outputs: Tensor = self.model(inputs.to(self.dtype))
        return outputs.float()


def choose_dtype(wanted: Literal["auto", "bf16", "fp16"], device: torch.device) -> tuple[Dtype, str]:
    """Chooses the dtype, and gives the reason in words. auto: bf16 where `device` computes in it, else fp16."""
    if wanted != "auto":
        return wanted, "as half.dtype says"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "this GPU computes in it") if native else ("fp16", "this GPU does not compute in bf16")
    flag = next((name for name in _CPU_FLAGS if torch.cpu.get_capabilities().get(name)), None)
    return ("bf16", f"this CPU computes in it ({flag})") if flag else ("fp16", "this CPU does not compute in bf16")


@torch.no_grad()
def require_half(model: HalfModel, example: Tensor) -> None:
    """Runs one forward pass; raises DataError where a part of the model requires float32."""
    try:
        model(example)
    except (RuntimeError, TypeError) as error:
        name = next(key for key, value in _DTYPES.items() if value == model.dtype)
        raise DataError(
            f"the model does not run in {name}: {first_line(error)}",
            "make new tensors in forward with dtype=x.dtype, or leave half out of the stages",
        ) from error
