"""Which runtime: OpenVINO where it is installed, else Inductor where a compiler is."""

from __future__ import annotations

from torch import Tensor, nn
from torch.export import ExportedProgram

from dist_train.lowering import inductor, openvino
from dist_train.lowering.base import Lowered, LoweringUnavailable


def lower(model: nn.Module | ExportedProgram, example: Tensor, threads: int) -> Lowered:
    """`model` in the first runtime that this machine has. Models to be compared must get the same one: compare `name`s.

    model: a converted model (Q/DQ) or a float one in eval mode. example: float32 [B, C, H, W], for its shape.

    Raises LoweringUnavailable, with what to install, where there is none; and where the model does not go into it.
    """
    missing = openvino.missing_modules()
    if not missing:
        return openvino.lower(model, example, threads)
    if inductor.compiler() is not None:
        return inductor.lower(model, example, threads)
    raise LoweringUnavailable(
        f"latency was not measured: {', '.join(missing)} not installed, and no C++ compiler for Inductor; "
        "pip install 'dist-train[openvino,onnx]'"
    )
