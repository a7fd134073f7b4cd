"""OpenVINO: the program as (QDQ) ONNX, compiled for the CPU in memory."""

from __future__ import annotations

import functools
import importlib.util
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dist_train.lowering.base import Lowered, LoweringUnavailable, Written, quiet
from dist_train.lowering.onnx import onnx_bytes

Precision = Literal["f32", "bf16", "f16"]
_KEPT = 8  # compiled batch sizes; each holds its own packed weights
_MODULES = ("openvino", "onnx", "onnxscript")


def missing_modules() -> list[str]:
    """Which of the modules that this lowering needs are not installed; nothing is imported."""
    return [name for name in _MODULES if importlib.util.find_spec(name) is None]


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """`import openvino` reports the import to Intel over the network where openvino_telemetry is installed.

    It has no switch for one program; without the module OpenVINO uses its own stub, for good in this process.
    """
    blocked = "openvino_telemetry" not in sys.modules
    if blocked:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if blocked:
            del sys.modules["openvino_telemetry"]


def _import_openvino() -> Any:
    missing = missing_modules()
    if missing:
        raise LoweringUnavailable(f"{', '.join(missing)} not installed: pip install 'dist-train[openvino,onnx]'")
    with _without_telemetry():
        import openvino
    return openvino


@functools.cache
def shared_core() -> Any:
    """OpenVINO's Core, one for the life of the process.

    On CPUs with AMX it gives the thread that first uses it an alternate stack for signals, and frees that with the Core. Where
    garbage collection frees it in another thread, the first one keeps a stack that is gone, and the next signal with a handler
    (SIGCHLD, where a DataLoader had workers) ends the process. Seen with OpenVINO 2026.4.1.
    """
    return _import_openvino().Core()


def computes_in(precision: Precision) -> bool:
    """Whether OpenVINO computes in this precision on this CPU, and not in another one that it was not asked for."""
    if precision == "f32":
        return True
    capability = {"bf16": "BF16", "f16": "FP16"}[precision]
    return capability in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def lower(model: nn.Module | ExportedProgram, example: Tensor, threads: int, precision: Precision = "f32") -> Lowered:
    """Compiles `model` by OpenVINO for the CPU with `threads` threads.

    model: a converted model (Q/DQ) or a float one in eval mode. example: float32 [B, C, H, W], for its shape.
    precision: that of floating-point arithmetic. OpenVINO has no bf16 in its ONNX reader: a half model is the float one,
        computed in half (where `computes_in` says so).

    Three choices besides the obvious:
    - One compiled model per batch size, made at its first call. OpenVINO 2026.4.1 answers wrongly for a batch of one where
      the int8 model was compiled with a dynamic batch (ResNet-18 at 32x32: off by three times the largest logit, while
      ONNX's reference evaluator agrees with torch to 4e-8); with a fixed batch it is right.
    - `read_model` instead of `convert_model`, which sends telemetry (and is slower).
    - The precision, f32 unless asked otherwise: OpenVINO would run a float model in bf16 where the CPU has it, and the
      comparison of int8 with FP32 would be one with bf16 (2x faster here). int8 parts stay int8 (integer kernels).

    Raises LoweringUnavailable where a module is missing or the model cannot be exported or compiled.
    """
    return Lowered("openvino", _compiled_call(onnx_bytes(model, example), None, example, threads, precision))


def write(model: nn.Module | ExportedProgram, example: Tensor, threads: int) -> Written:
    """OpenVINO IR, by way of ONNX: `model.xml` with the graph and `model.bin` with the weights, batch size free.

    Arguments and errors as of `lower`. `call` of the result is what was written, read back and compiled.
    """
    openvino = _import_openvino()
    with tempfile.TemporaryDirectory() as folder, quiet():
        try:
            graph = shared_core().read_model(io.BytesIO(onnx_bytes(model, example)))
        except RuntimeError as error:
            raise LoweringUnavailable(f"OpenVINO cannot read this model: {_reason(error)}") from error
        xml = Path(folder) / "model.xml"
        openvino.serialize(graph, xml)
        files = {"xml": xml.read_bytes(), "bin": xml.with_suffix(".bin").read_bytes()}
    call = _compiled_call(files["xml"], files["bin"], example, threads, "f32")
    usage = "openvino.Core().read_model(FILE), then reshape() to a fixed batch size: see lowering/openvino.py"
    return Written(files, call, f"openvino {openvino.__version__.partition('-')[0]}", usage)


def open_onnx(data: bytes, example: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
    """What `onnx_bytes` gave, compiled as in `lower`. Raises LoweringUnavailable where OpenVINO refuses it."""
    return _compiled_call(data, None, example, threads, "f32")


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _compiled_call(
    graph: bytes, weights: bytes | None, example: Tensor, threads: int, precision: Precision
) -> Callable[[Tensor], Tensor]:
    """A model (ONNX, or IR with its weights) as a function for any batch size. The rest is as in `lower`."""
    core = shared_core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,
    }

    @functools.lru_cache(maxsize=_KEPT)
    def compiled(batch: int) -> Any:
        try:
            with quiet():
                fixed = core.read_model(graph, weights) if weights else core.read_model(io.BytesIO(graph))
                fixed.reshape([batch, *example.shape[1:]])
                return core.compile_model(fixed, "CPU", settings)
        except RuntimeError as error:
            raise LoweringUnavailable(f"OpenVINO cannot compile this model: {_reason(error)}") from error

    def call(images: Tensor) -> Tensor:
        # share_inputs: no copy of the batch; the output is a copy, so that the next call does not overwrite it.
        return torch.from_numpy(compiled(len(images))(images.contiguous().numpy(), share_inputs=True)[0])

    compiled(1)  # so that a model that OpenVINO refuses is refused here, not in the midst of a measurement
    return call
