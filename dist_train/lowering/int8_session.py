"""Runtime for the int8 gate: one rank writes the model as ONNX bytes, and every rank opens them."""

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
    """Resolves `convert.runtime`; auto is the first runtime that is installed together with its model's exporter.

    Raises:
        LoweringUnavailable: it is not installed; the message says what to install.
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
    """Writes the program for the runtime `name` of `choose`. example: float32 [B, C, H, W]; only its shape counts.

    Raises:
        LoweringUnavailable: the program cannot be written as ONNX.
    """
    return onnx.onnxruntime_bytes(program, example) if name == "onnxruntime" else onnx.onnx_bytes(program, example)


def open_in(name: str, data: bytes, example: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
    """Opens the bytes of `runtime_bytes` in the runtime `name` of `choose`.

    Returns:
        The model: float32 [B, C, H, W] on the CPU to float32, for any B >= 1.

    Raises:
        LoweringUnavailable: the runtime is not installed, or it refuses the model.
    """
    if importlib.util.find_spec(name) is None:
        raise LoweringUnavailable(f"{name} not installed: pip install {name}")
    if name == "openvino":
        return openvino.open_onnx(data, example, threads)
    return onnx.open_onnx(data, threads)[0]
