"""OpenVINO: reads the program as (QDQ) ONNX and compiles it for the CPU, in memory."""

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
    """Returns the modules that this lowering needs and that are not installed. Imports nothing."""
    return [name for name in _MODULES if importlib.util.find_spec(name) is None]


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Hides openvino_telemetry inside the block: with it `import openvino` reports the import to Intel.

    Telemetry has no switch for one program. Without the module OpenVINO uses its own stub, for good in this process.
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
    """Returns OpenVINO's Core, one for the life of the process.

    On CPUs with AMX the Core gives the thread that first uses it an alternate signal stack, and frees it with itself.
    If another thread's garbage collection frees the Core, the first thread keeps a dangling stack. The next signal with
    a handler (SIGCHLD, after a DataLoader with workers) then ends the process. Seen with OpenVINO 2026.4.1.
    """
    return _import_openvino().Core()


def computes_in(precision: Precision) -> bool:
    """True where OpenVINO computes in this precision on this CPU, rather than in another one."""
    if precision == "f32":
        return True
    capability = {"bf16": "BF16", "f16": "FP16"}[precision]
    return capability in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def lower(model: nn.Module | ExportedProgram, example: Tensor, threads: int, precision: Precision = "f32") -> Lowered:
    """Compiles `model` by OpenVINO for the CPU.

    - One model is compiled for each batch size, at its first call. OpenVINO 2026.4.1 is wrong for a batch of one where
      the int8 model was compiled with a dynamic batch; with a fixed batch it is right. (ResNet-18 at 32x32 was off by
      three times the largest logit. ONNX's reference evaluator agreed with torch to 4e-8.)
    - `read_model` is used instead of `convert_model`, which is slower and sends telemetry.
    - The precision is f32 by default. Else OpenVINO runs float models in bf16 on CPUs that have it, 2x faster here. The
      int8 model would then be compared with bf16. int8 parts stay int8 (integer kernels).

    Args:
        model: a converted model (Q/DQ), or a float one in eval mode.
        example: float32 [B, C, H, W]; only its shape counts.
        threads: of inference.
        precision: of floating-point arithmetic. OpenVINO's ONNX reader has no bf16: a half model is the float one,
            computed in half (where `computes_in` allows it).

    Raises:
        LoweringUnavailable: a module is missing, or the model cannot be exported or compiled.
    """
    return Lowered("openvino", _compiled_call(onnx_bytes(model, example), None, example, threads, precision))


def write(model: nn.Module | ExportedProgram, example: Tensor, threads: int) -> Written:
    """Writes OpenVINO IR, from ONNX: `model.xml` with the graph and `model.bin` with the weights. The batch is dynamic.

    Arguments and errors as of `lower`. The result's `call` runs the written files, read back and compiled.
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
    # With a fixed batch size, and in float32: see `lower`.
    usage = (
        "import openvino; core = openvino.Core(); model = core.read_model(FILE); model.reshape(images.shape); "
        "core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})(images)[0]"
    )
    return Written(files, call, f"openvino {openvino.__version__.partition('-')[0]}", usage)


def open_onnx(data: bytes, example: Tensor, threads: int) -> Callable[[Tensor], Tensor]:
    """Compiles the result of `onnx_bytes` as `lower` does. Raises LoweringUnavailable where OpenVINO refuses it."""
    return _compiled_call(data, None, example, threads, "f32")


def _reason(error: Exception) -> str:
    """Returns the last line of an error's text: the lines before are OpenVINO's own call sites."""
    return str(error).strip().splitlines()[-1]


def _compiled_call(
    graph: bytes, weights: bytes | None, example: Tensor, threads: int, precision: Precision
) -> Callable[[Tensor], Tensor]:
    """Compiles a model (ONNX, or IR with its weights), as `lower` does, to a function for any batch size."""
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
        # share_inputs avoids a copy of the batch. The output is a copy, so that the next call does not overwrite it.
        return torch.from_numpy(compiled(len(images))(images.contiguous().numpy(), share_inputs=True)[0])

    compiled(1)  # a model that OpenVINO refuses then fails here, not during a measurement
    return call
