"""ONNX: written by torch.onnx, read back by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dist_train.lowering.base import LoweringUnavailable, Written, quiet


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


def write(model: nn.Module | ExportedProgram, example: Tensor, threads: int) -> Written:
    """`model.onnx` with the weights inside, batch size free; input `input`, output `logits`.

    Arguments and errors as of `onnx_bytes`; `call` of the result is ONNX Runtime on what was written.
    """
    data = onnx_bytes(model, example)
    call, runtime = open_onnx(data, threads)
    usage = "onnxruntime.InferenceSession(FILE).run(None, {'input': images})"
    return Written({"onnx": data}, call, runtime, usage)


def open_onnx(data: bytes, threads: int) -> tuple[Callable[[Tensor], Tensor], str]:
    """What `onnx_bytes` gave, in ONNX Runtime: float32 [B, C, H, W] to float32, for any B >= 1; and its name and version.

    Raises LoweringUnavailable where it cannot run the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
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
