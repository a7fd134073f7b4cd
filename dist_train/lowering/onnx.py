"""ONNX: written by torch.onnx, read back by ONNX Runtime."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dist_train.errors import first_line
from dist_train.lowering.base import FAILURES, LoweringUnavailable, Written, quiet

_KEPT = 2  # number of models whose ONNX is kept for the next runtime: fp32 and int8
_kept: dict[tuple[int, torch.Size, str], tuple[weakref.ref[Any], bytes]] = {}


def onnx_bytes(model: nn.Module | ExportedProgram, example: Tensor) -> bytes:
    """Exports the model as ONNX with a dynamic batch: QDQ for a converted model, float for a float one in eval mode.

    Every runtime asks for it again, and tracing hundreds of nodes takes seconds. The newest results are kept while
    their models live and have the same values.

    Args:
        example: float32 [B, C, H, W]; only its shape [C, H, W] counts.

    Raises:
        LoweringUnavailable: the model cannot be exported; with the first line of torch's reason.
    """
    key = (id(model), example.shape[1:], _digest(model))
    found = _kept.get(key)
    if found is not None and found[0]() is model:
        return found[1]
    data = _export(model, example)
    while len(_kept) >= _KEPT:
        del _kept[next(iter(_kept))]
    _kept[key] = weakref.ref(model, lambda _: _kept.pop(key, None)), data
    return data


def _digest(model: nn.Module | ExportedProgram) -> str:
    """Hashes the graph and all tensors, to notice a model that was changed in place."""
    if isinstance(model, ExportedProgram):
        text, values = str(model.graph), {**model.state_dict, **model.constants}
    else:
        text = f"{model} {getattr(model, 'code', '')}"
        values = dict([*model.named_parameters(), *model.named_buffers()])
    digest = hashlib.blake2b(text.encode())
    for name, value in values.items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _export(model: nn.Module | ExportedProgram, example: Tensor) -> bytes:
    from dist_train.lowering.rewrites.onnx_qdq import quantize_summands, read_joined

    # Two rows, because torch.export makes a batch of one a constant.
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
            proto = program.model_proto
    except FAILURES as error:  # OnnxExporterError is a RuntimeError
        raise LoweringUnavailable(f"torch.onnx.export cannot export this model: {first_line(error)}") from error
    quantize_summands(proto)
    read_joined(proto)
    return proto.SerializeToString()


def write(model: nn.Module | ExportedProgram, example: Tensor, threads: int) -> Written:
    """Writes `model.onnx` with the weights inside and a dynamic batch size; input `input`, output `logits`.

    Arguments and errors as of `onnx_bytes`. The result's `call` runs the written file in ONNX Runtime.
    """
    data = onnxruntime_bytes(model, example)
    call, runtime = open_onnx(data, threads)
    usage = "import onnxruntime; onnxruntime.InferenceSession(FILE).run(None, {'input': images})[0]"
    return Written({"onnx": data}, call, runtime, usage)


def onnxruntime_bytes(model: nn.Module | ExportedProgram, example: Tensor) -> bytes:
    """Exports as `onnx_bytes`, with biases in int32, which ONNX Runtime needs to compute in integers."""
    import onnx

    from dist_train.lowering.rewrites.onnx_qdq import quantize_biases

    proto = onnx.load_from_string(onnx_bytes(model, example))
    quantize_biases(proto)
    data: bytes = proto.SerializeToString()
    return data


def open_onnx(data: bytes, threads: int) -> tuple[Callable[[Tensor], Tensor], str]:
    """Opens an ONNX model in ONNX Runtime.

    Returns:
        The model, float32 [B, C, H, W] to float32, for any B >= 1; and the runtime's name and version.

    Raises:
        LoweringUnavailable: it cannot run the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Else its threads would spin while the next runtime is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors only; users cannot act on warnings about its optimizations
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except _onnxruntime_errors() as error:
        raise LoweringUnavailable(f"ONNX Runtime cannot run this model: {first_line(error)}") from error

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"input": images.contiguous().numpy()})[0])

    return call, f"onnxruntime {onnxruntime.__version__}"


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    """Returns the errors for a model that it cannot run. They have no common base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (state.InvalidGraph, state.NotImplemented, state.Fail, state.RuntimeException, state.InvalidArgument)
