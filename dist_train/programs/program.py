"""A model as bytes, of either kind, and the way to open it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from dist_train.programs.pt2 import load_program
from dist_train.programs.torchscript import load_script


@dataclass(frozen=True)
class Program:
    """A model as it is deployed.

    Attributes:
        kind: "pt2" (torch.export) or "torchscript" (traced); says how `data` is read.
        data: the bytes of `model.pt2` or `model.ts`.
        extra: further files that belong to it, by name, such as the state_dict of an FX model.
    """

    kind: Literal["pt2", "torchscript"]
    data: bytes
    extra: dict[str, bytes] = field(default_factory=dict)


def open_program(program: Program) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model as a function on the CPU: float32 [B, ...], contiguous, to what the model returns.

    Raises ArtifactError as `load_program` and `load_script` do. Only for bytes from where you trust.
    """
    if program.kind == "torchscript":
        return load_script(program.data)
    module: Callable[[torch.Tensor], torch.Tensor] = load_program(program.data).module()
    return module
