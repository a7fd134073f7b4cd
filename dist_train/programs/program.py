"""A model as bytes, of either kind, and how to open it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from dist_train.programs.pt2 import OPERATORS, has_integers, load_program
from dist_train.programs.torchscript import load_script, script_engine

_SUFFIXES = {"pt2": "pt2", "torchscript": "ts"}


@dataclass(frozen=True)
class Program:
    """A deployed model as bytes.

    Attributes:
        kind: "pt2" (torch.export) or "torchscript" (traced); decides how `data` is read.
        data: the bytes of `model.pt2` or `model.ts`.
        extra: further files that belong to it, by name, such as the state_dict of an FX model.
    """

    kind: Literal["pt2", "torchscript"]
    data: bytes
    extra: dict[str, bytes] = field(default_factory=dict)

    @property
    def suffix(self) -> str:
        """Suffix of the program's file, without the dot."""
        return _SUFFIXES[self.kind]

    @property
    def usage(self) -> str:
        """Python that runs the program's file by torch alone, as `Written.usage`."""
        if self.kind == "torchscript":
            engine = f"torch.backends.quantized.engine = {script_engine(self.data)!r}"
            return f"import torch; {engine}; torch.jit.load(FILE).eval()(torch.from_numpy(images)).detach()"
        needed = f"import {OPERATORS}; " if has_integers(self.data) else ""
        return f"import torch; {needed}torch.export.load(FILE).module()(torch.from_numpy(images)).detach()"

    @property
    def extra_usage(self) -> dict[str, str]:
        """Python that reads each extra file, by name: tensors of all kinds, without code."""
        return dict.fromkeys(sorted(self.extra), "import torch; torch.load(FILE, weights_only=True)")

    @property
    def lowers(self) -> bool:
        """True where other runtimes can take the program; TorchScript holds integer kernels and is its own runtime."""
        return self.kind == "pt2"


def open_program(program: Program) -> Callable[[torch.Tensor], torch.Tensor]:
    """Opens a program as a function on the CPU: contiguous float32 [B, ...] to the model's outputs.

    Raises ArtifactError as `load_program` and `load_script` do. Only for bytes from a source you trust.
    """
    if program.kind == "torchscript":
        return load_script(program.data)
    module: Callable[[torch.Tensor], torch.Tensor] = load_program(program.data).module()
    return module
