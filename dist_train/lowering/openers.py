"""Opening of the formats' files as a user's program does, by the manifest's `usage`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dist_train.lowering.onnx import arrays_of
from dist_train.programs.program import Call
from dist_train.programs.signature import tree_of
from dist_train.trees import Tree


def _onnx(file: Path, outputs: Sequence[str]) -> Call:
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    return lambda inputs: tree_of(outputs, [torch.from_numpy(each) for each in session.run(None, arrays_of(inputs))])


def _openvino(file: Path, outputs: Sequence[str]) -> Call:
    from dist_train.lowering.openvino import shared_core

    core = shared_core()

    def call(inputs: Tree) -> Tree:
        model = core.read_model(file)  # finds the weights beside it
        alone = isinstance(inputs, Tensor)
        arrays = {0: inputs.contiguous().numpy()} if alone else arrays_of(inputs)
        model.reshape({name: list(each.shape) for name, each in arrays.items()})
        found = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(arrays)
        return tree_of(outputs, [torch.from_numpy(found[place]) for place in range(len(outputs))])

    return call


def _executorch(file: Path, outputs: Sequence[str]) -> Call:
    from executorch.runtime import Runtime

    from dist_train.lowering.executorch import by_rows

    program = Runtime.get().load_program(file)
    return by_rows(program.load_method("forward"), outputs, program)


OPENERS: dict[str, Callable[[Path, Sequence[str]], Call]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "executorch": _executorch,
}
"""By built-in format: from a file and its outputs' names to a function of contiguous inputs [B, ...] on the CPU."""
