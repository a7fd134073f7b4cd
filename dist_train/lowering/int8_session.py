"""Runtime for the int8 gate: one rank writes the model as ONNX bytes, and every rank opens them."""

from __future__ import annotations

import importlib.util
import json
from typing import Literal

from torch.export import ExportedProgram

from dist_train import registry
from dist_train.lowering import onnx, openvino
from dist_train.lowering.base import Call, LoweringUnavailable
from dist_train.programs.signature import output_names
from dist_train.trees import Tree

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


def runtime_bytes(name: str, program: ExportedProgram, example: Tree) -> bytes:
    """Writes the program for the runtime `name` of `choose`; the names of several outputs go before it.

    example: real rows [B, ...]; of floats only the shape counts.

    Raises:
        LoweringUnavailable: the program cannot be written as ONNX.
    """
    write = onnx.onnxruntime_bytes if name == "onnxruntime" else onnx.onnx_bytes
    data, outputs = write(program, example), output_names(program, example)
    return data if outputs == [""] else json.dumps(outputs).encode() + b"\n" + data


def open_in(name: str, data: bytes, example: Tree, threads: int) -> Call:
    """Opens the bytes of `runtime_bytes` in the runtime `name` of `choose`.

    Returns:
        The model: inputs [B, ...] on the CPU to outputs, for any B >= 1.

    Raises:
        LoweringUnavailable: the runtime is not installed, or it refuses the model.
    """
    if importlib.util.find_spec(name) is None:
        raise LoweringUnavailable(f"{name} not installed: pip install {name}")
    outputs = [""]
    if data[:1] == b"[":  # ONNX begins with another byte
        header, _, data = data.partition(b"\n")
        outputs = json.loads(header)
    if name == "openvino":
        return openvino.open_files([data], example, threads, outputs)
    return onnx.open_onnx(data, threads, outputs)[0]
