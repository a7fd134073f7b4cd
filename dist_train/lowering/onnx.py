"""ONNX: written by torch.onnx, read back by ONNX Runtime."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dist_train.lowering.base import LoweringUnavailable, Written, quiet

_KEPT = 2  # models whose ONNX is kept, for the next runtime that asks: fp32 and int8
_kept: dict[tuple[int, torch.Size, str], tuple[weakref.ref[Any], bytes]] = {}


def onnx_bytes(model: nn.Module | ExportedProgram, example: Tensor) -> bytes:
    """The model as ONNX with a dynamic batch: QDQ for a converted model, float for a float one (in eval mode).

    example: float32 [B, C, H, W]; only its shape [C, H, W] is used, the export sees zeros.
    Raises LoweringUnavailable, with the first line of torch's reason, where the model cannot be exported.

    Each runtime asks for it anew, and tracing a graph of hundreds of nodes takes seconds: the newest are kept while their models
    live and hold the same values.
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
    """Of whatever the ONNX is made of, in case the model was changed in place."""
    if isinstance(model, ExportedProgram):
        text, values = str(model.graph), {**model.state_dict, **model.constants}
    else:
        text = f"{model} {getattr(model, 'code', '')}"
        values = dict([*model.named_parameters(), *model.named_buffers()])
    digest = hashlib.blake2b(text.encode())
    for name, value in values.items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _export(model: nn.Module | ExportedProgram, example: Tensor) -> bytes:
    from dist_train.lowering.rewrites.onnx_qdq import quantize_summands, read_joined

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
            proto = program.model_proto
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LoweringUnavailable(f"torch.onnx.export cannot export this model: {reason}") from error
    quantize_summands(proto)
    read_joined(proto)
    return proto.SerializeToString()


def write(model: nn.Module | ExportedProgram, example: Tensor, threads: int) -> Written:
    """`model.onnx` with the weights inside, batch size free; input `input`, output `logits`.

    Arguments and errors as of `onnx_bytes`; `call` of the result is ONNX Runtime on what was written.
    """
    data = onnxruntime_bytes(model, example)
    call, runtime = open_onnx(data, threads)
    usage = "onnxruntime.InferenceSession(FILE).run(None, {'input': images})"
    return Written({"onnx": data}, call, runtime, usage)


def onnxruntime_bytes(model: nn.Module | ExportedProgram, example: Tensor) -> bytes:
    """What `onnx_bytes` gives, in the form that ONNX Runtime runs in integers: biases in int32."""
    import onnx

    from dist_train.lowering.rewrites.onnx_qdq import quantize_biases

    proto = onnx.load_from_string(onnx_bytes(model, example))
    quantize_biases(proto)
    data: bytes = proto.SerializeToString()
    return data


def open_onnx(data: bytes, threads: int) -> tuple[Callable[[Tensor], Tensor], str]:
    """An ONNX model in ONNX Runtime: float32 [B, C, H, W] to float32, for any B >= 1; and its name and version.

    Raises LoweringUnavailable where it cannot run the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would spin on while the next runtime is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors; warnings about its own optimisations are not for our users
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except _onnxruntime_errors() as error:
        reason = str(error).strip().splitlines()[0]
        raise LoweringUnavailable(f"ONNX Runtime cannot run this model: {reason}") from error

    def call(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"input": images.contiguous().numpy()})[0])

    return call, f"onnxruntime {onnxruntime.__version__}"


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    """Its errors have no common base; these are those of a model that it cannot take."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (state.InvalidGraph, state.NotImplemented, state.Fail, state.RuntimeException, state.InvalidArgument)
