"""Opening of the formats' files as a user's program does, by the manifest's `usage`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[Tensor], Tensor]


def _onnx(file: Path) -> Call:
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    return lambda images: torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


def _openvino(file: Path) -> Call:
    from dist_train.lowering.openvino import shared_core

    core = shared_core()

    def call(images: Tensor) -> Tensor:
        model = core.read_model(file)  # finds the weights beside it
        model.reshape(list(images.shape))
        return torch.from_numpy(
            core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images.numpy())[0]
        )

    return call


def _executorch(file: Path) -> Call:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(file).load_method("forward")
    return lambda images: torch.cat([method.execute((image,))[0].clone() for image in images.split(1)])


OPENERS: dict[str, Callable[[Path], Call]] = {"onnx": _onnx, "openvino": _openvino, "executorch": _executorch}
"""By built-in format: from a file to a function of contiguous float32 [B, C, H, W] on the CPU."""
