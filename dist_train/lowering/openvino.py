"""OpenVINO: the program as (QDQ) ONNX, compiled for the CPU in memory."""

from __future__ import annotations

import functools
import importlib.util
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dist_train.lowering.base import Lowered, LoweringUnavailable, quiet

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


def onnx_bytes(model: nn.Module | ExportedProgram, example: Tensor) -> bytes:
    """The model as ONNX with a dynamic batch: QDQ for a converted model, float for a float one (in eval mode).

    example: float32 [B, C, H, W]; only its shape [C, H, W] is used, the export sees zeros.
    Raises LoweringUnavailable, with the first line of torch's reason, where the model cannot be exported.
    """
    # Two rows, because torch.export takes a batch of one for a constant.
    zeros = torch.zeros(2, *example.shape[1:])
    shapes: dict[str, Any] = (
        {} if isinstance(model, ExportedProgram) else {"dynamic_shapes": ({0: Dim("batch", min=1)},)}
    )
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                model, (zeros,), dynamo=True, verbose=False, input_names=["input"], output_names=["logits"], **shapes
            )
            assert program is not None  # it is, with dynamo=True
            return program.model_proto.SerializeToString()
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LoweringUnavailable(f"torch.onnx.export cannot export this model: {reason}") from error


def lower(model: nn.Module | ExportedProgram, example: Tensor, threads: int) -> Lowered:
    """Compiles `model` by OpenVINO for the CPU with `threads` threads.

    model: a converted model (Q/DQ) or a float one in eval mode. example: float32 [B, C, H, W], for its shape.

    Three choices besides the obvious:
    - One compiled model per batch size, made at its first call. OpenVINO 2026.4.1 answers wrongly for a batch of one where
      the int8 model was compiled with a dynamic batch (ResNet-18 at 32x32: off by three times the largest logit, while
      ONNX's reference evaluator agrees with torch to 4e-8); with a fixed batch it is right.
    - `read_model` instead of `convert_model`, which sends telemetry (and is slower).
    - The precision f32: OpenVINO would otherwise run a float model in bf16 where the CPU has it, and the comparison of int8
      with FP32 would be one with bf16 (2x faster here). int8 parts stay int8 (integer kernels).

    Raises LoweringUnavailable where a module is missing or the model cannot be exported or compiled.
    """
    openvino = _import_openvino()
    onnx_model = onnx_bytes(model, example)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }
    core = openvino.Core()

    @functools.lru_cache(maxsize=_KEPT)
    def compiled(batch: int) -> Any:
        try:
            with quiet():
                fixed = core.read_model(io.BytesIO(onnx_model))
                fixed.reshape([batch, *example.shape[1:]])
                return core.compile_model(fixed, "CPU", settings)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise LoweringUnavailable(f"OpenVINO cannot compile this model: {reason}") from error

    def call(images: Tensor) -> Tensor:
        # share_inputs: no copy of the batch; the output is a copy, so that the next call does not overwrite it.
        return torch.from_numpy(compiled(len(images))(images.contiguous().numpy(), share_inputs=True)[0])

    compiled(1)  # so that a model that OpenVINO refuses is refused here, not in the midst of a measurement
    return Lowered("openvino", call)
