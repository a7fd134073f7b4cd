"""Inductor: torch.compile with frozen weights. Needs a C++ compiler where the model runs."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from dist_train import trees
from dist_train.errors import first_line
from dist_train.lowering.base import FAILURES, Call, Lowered, LoweringUnavailable, quiet
from dist_train.lowering.rewrites.quantized_graph import channels_with_zero_points
from dist_train.programs.signature import rows
from dist_train.trees import Tree


def compiler() -> str | None:
    """Returns the path of the C++ compiler that Inductor will use ($CXX or g++), or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def lower(
    model: nn.Module | ExportedProgram, example: Tree, threads: int, batches: Sequence[int] = (1, 2, 3)
) -> Lowered:
    """Compiles `model` by Inductor with frozen weights, for batches of one and for any other size.

    Args:
        model: a converted model (Q/DQ), or a float one in eval mode. Its weights are frozen in: do not train it later.
        example: real rows [B, ...]; of floats only the shape counts.
        threads: of each call; the process's number is restored afterwards.
        batches: sizes to compile now: one, and the first other. From the second other size on Inductor makes the batch
            dynamic.

    Raises:
        LoweringUnavailable: there is no C++ compiler, a weight has zero points per channel, or Inductor cannot compile
            the model.
    """
    if compiler() is None:
        raise LoweringUnavailable("no C++ compiler for Inductor: install g++, or name one in CXX")
    # Importing it registers the fusion of Q/DQ patterns into oneDNN's int8 kernels. Otherwise int8 is simulated in
    # float.
    try:
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
    except ImportError as error:
        raise LoweringUnavailable(f"Inductor's int8 kernels need torchao: {error}") from error

    module = model.module(check_guards=False) if isinstance(model, ExportedProgram) else model
    if isinstance(module, GraphModule):
        _refuse_channels_with_zero_points(module)
    try:
        try:
            return Lowered("inductor", _compiled_call(module, example, threads, batches, dynamic=None))
        except AssertionError:
            # Inductor 2.14 asserts in its generated code that a batch-dynamic int8 convolution of one channel returns a
            # contiguous tensor, which fails. Each size by itself is right. The copy has no compiled code yet.
            return Lowered("inductor", _compiled_call(copy.deepcopy(module), example, threads, batches, dynamic=False))
    except (*FAILURES, torch._dynamo.exc.TorchDynamoException) as error:
        raise LoweringUnavailable(f"Inductor cannot compile this model: {first_line(error)}") from error


def _refuse_channels_with_zero_points(module: GraphModule) -> None:
    """Raises LoweringUnavailable for weights with zero points per channel.

    Inductor fuses them into oneDNN's convolution and linear, which ignore them: outputs are wrong by their own size.
    Seen with torch 2.14.1, for both layers and every batch size. One zero point for all channels matches no pattern,
    and is right.
    """
    found = channels_with_zero_points(module)
    if found:
        raise LoweringUnavailable(
            "torch's Inductor ignores the zero points of int8 weights with a scale for each channel "
            f"({len(found)} layers, by scheme affine in qat.rules): OpenVINO and ONNX Runtime take them"
        )


def _compiled_call(
    module: nn.Module, example: Tree, threads: int, batches: Sequence[int], dynamic: bool | None
) -> Call:
    """Compiles as `lower` does. dynamic: of torch.compile; False compiles each batch size at its first call."""
    import torch._inductor.config as inductor_config

    compiled = torch.compile(module, dynamic=dynamic)
    seen: set[tuple[torch.Size, ...]] = set()

    def call(inputs: Tree) -> Tree:
        shapes = tuple(leaf.shape for leaf in trees.leaves(inputs))
        previous = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                if shapes in seen:
                    return trees.plain(trees.call(compiled, inputs))
                # A new shape may compile. The config is patched around the call, as `torch.compile(options=...)` comes
                # too late for Q/DQ.
                with quiet(), inductor_config.patch(freezing=True):
                    outputs = trees.plain(trees.call(compiled, inputs))
                seen.add(shapes)
                return outputs
        finally:
            torch.set_num_threads(previous)

    for batch in batches:
        call(rows(example, batch))
    return call
