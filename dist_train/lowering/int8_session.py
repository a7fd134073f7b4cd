"""The runtime that int8 is judged in: its model as ONNX bytes, which one rank makes and every rank opens."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.export import ExportedProgram

from dist_train import registry
from dist_train.lowering import onnx, openvino
from dist_train.lowering.base import LoweringUnavailable

Runtime = Literal["openvino", "onnxruntime"]
_FORMATS: dict[Runtime, str] = {"openvino": "openvino", "onnxruntime": "onnx"}  # the faster one first


def choose(wanted: Runtime | Literal["auto"]) -> Runtime:
    """The runtime that is asked for; auto: the first that is installed here, with what writes its models.

    Raises LoweringUnavailable, with what to install.
    """
    candidates = tuple(_FORMATS) if wanted == "auto" else (wanted,)
    missing = {name: registry.export_formats.entry(_FORMATS[name]).missing() for name in candidates}
    for name in candidates:
        if not missing[name]:
            return name
    raise LoweringUnavailable(
        f"{', '.join(missing[candidates[0]])} not installed: pip install 'dist-train[openvino,onnx]'"
    )


def runtime_bytes(name: str, program: ExportedProgram, example: Tensor) -> bytes:
    """What the runtime that `choose` named opens. example: float32 [B, C, H, W], for its shape.

    Raises LoweringUnavailable where the program cannot be written as ONNX.
    """
    return onnx.onnxruntime_bytes(program, example) if name == "onnxruntime" else onnx.onnx_bytes(program, example)


def open_in(name: str, data: bytes, example: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
    """The model in the runtime that `choose` named, as a function: float32 [B, C, H, W] on the CPU to float32, for any B >= 1.

    Raises LoweringUnavailable where the runtime is not installed or refuses the model.
    """
    if importlib.util.find_spec(name) is None:
        raise LoweringUnavailable(f"{name} not installed: pip install {name}")
    if name == "openvino":
        return openvino.open_onnx(data, example, threads)
    return onnx.open_onnx(data, threads)[0]
