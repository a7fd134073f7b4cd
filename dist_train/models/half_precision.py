"""Half precision: a model in bf16 or fp16, with float32 inputs and outputs. Integers stay as they are."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn

from dist_train import trees
from dist_train.errors import DataError, first_line
from dist_train.trees import Tree

Dtype = Literal["bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_CPU_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")  # the last one is ARM's


class HalfModel(nn.Module):
    """A copy of `model` with floating-point parameters and buffers in `dtype`; takes and returns float32.

    A tree of outputs is `trees.plain`.
    """

    def __init__(self, model: nn.Module, dtype: Dtype) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False).to(_DTYPES[dtype])
        self.dtype = _DTYPES[dtype]

    def forward(self, inputs: Any = None, /, *args: Any, **kwargs: Any) -> Tree:
        """Takes inputs as the float model takes them; floats become half, and those that return become float32."""
        given = _cast(() if inputs is None else (inputs, *args), self.dtype)
        return _cast(trees.plain(self.model(*given, **_cast(kwargs, self.dtype))), torch.float32)


def _cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Returns the tree with its floats in `dtype`, by steps that torch.export can trace."""
    if isinstance(tree, dict):
        return {key: _cast(part, dtype) for key, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple([_cast(part, dtype) for part in tree])
    return tree.to(dtype) if tree.is_floating_point() else tree


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
def require_half(model: HalfModel, example: Tree) -> None:
    """Runs one forward pass; raises DataError where a part of the model requires float32."""
    try:
        trees.call(model, example)
    except (RuntimeError, TypeError) as error:
        name = next(key for key, value in _DTYPES.items() if value == model.dtype)
        raise DataError(
            f"the model does not run in {name}: {first_line(error)}",
            "make new tensors in forward with dtype=x.dtype, or leave half out of the stages",
        ) from error
