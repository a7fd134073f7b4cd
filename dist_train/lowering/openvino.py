"""OpenVINO: reads the program as (QDQ) ONNX and compiles it for the CPU, in memory."""

from __future__ import annotations

import functools
import importlib.util
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dist_train import trees
from dist_train.lowering.base import Call, Lowered, LoweringUnavailable, Written, quiet
from dist_train.lowering.isolated import refuse_crash
from dist_train.lowering.onnx import arrays_of, fed, onnx_bytes
from dist_train.programs.signature import Dynamic, output_names, tree_of
from dist_train.trees import Tree

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


def lower(
    model: nn.Module | ExportedProgram,
    example: Tree,
    threads: int,
    precision: Precision = "f32",
    dynamic: Dynamic | None = None,
) -> Lowered:
    """Compiles `model` by OpenVINO for the CPU.

    - One model is compiled for each batch size, at its first call. OpenVINO 2026.4.1 is wrong for a batch of one where
      the int8 model was compiled with a dynamic batch; with a fixed batch it is right. (ResNet-18 at 32x32 was off by
      three times the largest logit. ONNX's reference evaluator agreed with torch to 4e-8.)
    - `read_model` is used instead of `convert_model`, which is slower and sends telemetry.
    - The precision is f32 by default. Else OpenVINO runs float models in bf16 on CPUs that have it, 2x faster here. The
      int8 model would then be compared with bf16. int8 parts stay int8 (integer kernels).

    Args:
        model: a converted model (Q/DQ), or a float one in eval mode.
        example: real rows [B, ...]; of floats only the shape counts.
        threads: of inference.
        dynamic: dimensions that vary besides the batch; in OpenVINO they do.
        precision: of floating-point arithmetic. OpenVINO's ONNX reader has no bf16: a half model is the float one,
            computed in half (where `computes_in` allows it).

    Raises:
        LoweringUnavailable: a module is missing, or the model cannot be exported or compiled.
    """
    data, outputs = onnx_bytes(model, example, dynamic), output_names(model, example)
    return Lowered("openvino", _compiled_call(data, None, example, threads, precision, outputs))


def write(model: nn.Module | ExportedProgram, example: Tree, threads: int, dynamic: Dynamic | None = None) -> Written:
    """Writes OpenVINO IR, from ONNX: `model.xml` with the graph and `model.bin` with the weights. The batch is dynamic.

    Arguments and errors as of `lower`. The result's `call` runs the written files, read back and compiled.
    """
    try:
        with quiet():
            graph = shared_core().read_model(io.BytesIO(onnx_bytes(model, example, dynamic)))
    except RuntimeError as error:
        raise LoweringUnavailable(f"OpenVINO cannot read this model: {_reason(error)}") from error
    files = serialized(graph)
    outputs = output_names(model, example)
    call = open_files(list(files.values()), example, threads, outputs)
    # With a fixed batch size, and in float32: see `lower`.
    first = "import openvino; core = openvino.Core(); model = core.read_model(FILE); "
    compiled = "core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})"
    usage = f"{first}model.reshape(images.shape); {compiled}(images)[0]"
    if not isinstance(example, Tensor) or outputs != [""]:
        given = "{'input': images}" if isinstance(example, Tensor) else fed(example)
        reshaped = "model.reshape({name: each.shape for name, each in given.items()})"
        returned = f"found = {compiled}(given); [found[place] for place in range(len(found))]"
        usage = f"{first}given = {given}; {reshaped}; {returned}"
    return Written(files, call, runtime(), usage)


def runtime() -> str:
    """Returns the runtime's name and version."""
    return f"openvino {_import_openvino().__version__.partition('-')[0]}"


def serialized(graph: Any) -> dict[str, bytes]:
    """Returns the files of an `openvino.Model` by suffix: xml and bin."""
    openvino = _import_openvino()
    with tempfile.TemporaryDirectory() as folder, quiet():
        xml = Path(folder) / "model.xml"
        openvino.serialize(graph, xml)
        return {"xml": xml.read_bytes(), "bin": xml.with_suffix(".bin").read_bytes()}


def open_files(files: Sequence[bytes], example: Tree, threads: int, outputs: Sequence[str] = ("",)) -> Call:
    """Compiles files as `lower` does: the result of `onnx_bytes`, or IR's xml and bin.

    outputs: names of the model's outputs.

    Raises LoweringUnavailable where OpenVINO refuses them.
    """
    graph, *weights = files
    return _compiled_call(graph, weights[0] if weights else None, example, threads, "f32", outputs)


class Streams:
    """A model under load: OpenVINO computes several requests at once, in streams, each by some of the threads.

    It chooses the number of streams (the performance hint THROUGHPUT). Requests are asynchronous: a thread that becomes
    free takes the next one. One model is compiled for each batch size, as in `lower`.
    """

    def __init__(self, files: Sequence[bytes], example: Tree, threads: int, outputs: Sequence[str] = ("",)) -> None:
        """Takes arguments as `open_files`, and raises as it does."""
        self._outputs = outputs
        graph, *weights = files
        settings = _settings(threads, "f32", {"PERFORMANCE_HINT": "THROUGHPUT"})
        compiled = _compiler(graph, weights[0] if weights else None, example, settings)
        openvino = _import_openvino()
        self._queue = functools.lru_cache(maxsize=_KEPT)(lambda rows: openvino.AsyncInferQueue(compiled(rows)))

    def __call__(self, batches: Sequence[Tree]) -> list[Tree]:
        """Returns the outputs of batches of equal size, in their order."""
        outputs: dict[int, Tree] = {}

        def keep(request: Any, place: int) -> None:
            # Copied, as the next request overwrites the runtime's outputs.
            found = [request.get_output_tensor(index).data.copy() for index in range(len(self._outputs))]
            outputs[place] = tree_of(self._outputs, [torch.from_numpy(each) for each in found])

        queue = self._queue(trees.rows_of(batches[0]))
        queue.set_callback(keep)
        given = [_given(batch) for batch in batches]  # kept until all are answered: inputs are shared
        for place, arrays in enumerate(given):
            queue.start_async(arrays, place, share_inputs=True)
        queue.wait_all()
        return [outputs[place] for place in range(len(batches))]

    def at_once(self, rows: int) -> int:
        """Returns the number of requests that are computed at once, for batches of so many rows."""
        return len(self._queue(rows))


def _reason(error: Exception) -> str:
    """Returns the last line of an error's text: the lines before are OpenVINO's own call sites."""
    return str(error).strip().splitlines()[-1]


def _given(inputs: Tree) -> dict[Any, Any]:
    """Returns the arrays that a compiled model takes: by name, or the only one by its place."""
    return {0: inputs.contiguous().numpy()} if isinstance(inputs, Tensor) else arrays_of(inputs)


def _compiled_call(
    graph: bytes,
    weights: bytes | None,
    example: Tree,
    threads: int,
    precision: Precision,
    outputs: Sequence[str],
) -> Call:
    """Compiles a model (ONNX, or IR with its weights), as `lower` does, to a function for any batch size."""
    one_stream = {"NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = _compiler(graph, weights, example, _settings(threads, precision, one_stream))

    def call(inputs: Tree) -> Tree:
        # share_inputs avoids a copy of the batch. The output is a copy, so that the next call does not overwrite it.
        found = compiled(trees.rows_of(inputs))(_given(inputs), share_inputs=True)
        return tree_of(outputs, [torch.from_numpy(found[place]) for place in range(len(outputs))])

    return call


def _settings(threads: int, precision: Precision, more: Mapping[str, Any]) -> dict[str, Any]:
    common = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "ENABLE_CPU_PINNING": False}
    return common | dict(more)


def _compiler(graph: bytes, weights: bytes | None, example: Tree, settings: Mapping[str, Any]) -> Callable[[int], Any]:
    """Returns a function that compiles the model for a batch size, and keeps the newest.

    Raises LoweringUnavailable where OpenVINO refuses the model for a batch of one.
    """
    core, shapes = shared_core(), _shapes(graph, weights, example)

    @functools.lru_cache(maxsize=_KEPT)
    def compiled(batch: int) -> Any:
        try:
            with quiet():
                fixed = core.read_model(graph, weights) if weights else core.read_model(io.BytesIO(graph))
                fixed.reshape({place: [batch, *shape] for place, shape in enumerate(shapes)})
                return core.compile_model(fixed, "CPU", dict(settings))
        except RuntimeError as error:
            raise LoweringUnavailable(f"OpenVINO cannot compile this model: {_reason(error)}") from error

    refuse_crash(graph, weights, [[1, *shape] for shape in shapes], settings)
    compiled(1)  # a model that OpenVINO refuses then fails here, not during a measurement
    return compiled


def _shapes(graph: bytes, weights: bytes | None, example: Tree) -> list[list[int]]:
    """Returns the shapes of a model's inputs without the batch, -1 for a size that varies."""
    if isinstance(example, Tensor) and example.dim() == 4:  # images, of one size
        return [list(example.shape[1:])]
    core = shared_core()
    try:
        with quiet():
            model = core.read_model(graph, weights) if weights else core.read_model(io.BytesIO(graph))
    except RuntimeError as error:
        raise LoweringUnavailable(f"OpenVINO cannot read this model: {_reason(error)}") from error
    found = [list(each.get_partial_shape())[1:] for each in model.inputs]
    return [[-1 if size.is_dynamic else size.get_length() for size in shape] for shape in found]
