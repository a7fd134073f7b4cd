"""ExecuTorch: a `.pte` for phones and small devices, with XNNPACK's kernels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from dist_train import trees
from dist_train.errors import first_line
from dist_train.lowering.base import FAILURES, Call, LoweringUnavailable, Written, quiet
from dist_train.lowering.rewrites.xnnpack import for_xnnpack
from dist_train.programs.signature import Dynamic, output_names, rows, tree_of
from dist_train.trees import Tree


def write(model: nn.Module | ExportedProgram, example: Tree, threads: int, dynamic: Dynamic | None = None) -> Written:
    """Writes `model.pte` for a batch of one, as ExecuTorch plans its memory ahead; its Python runtime reads it back.

    Args:
        model: a float or half model in eval mode, or an int8 program.
        example: real rows [B, ...]; of floats only the shape counts. Leaves are taken by position, in order.
        threads: ignored; XNNPACK uses all of the device's.
        dynamic: dimensions that vary besides the batch.

    Raises:
        LoweringUnavailable: ExecuTorch cannot lower the model, or XNNPACK has no integer kernel for a layer with int8
            weights. Float arithmetic behind portable dequantize kernels would not be an int8 model.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.error import ExportError, InternalError

    if dynamic:
        varying = ", ".join(sorted({name for places in dynamic.values() for name in places.values()}))
        raise LoweringUnavailable(
            f"ExecuTorch plans its memory ahead, and {varying} varies: give data of one size, or take onnx or openvino"
        )
    one = rows(example, 1)
    args, kwargs = trees.arguments(one)
    try:
        with quiet(), torch.no_grad():
            int8 = isinstance(model, ExportedProgram)
            module = for_xnnpack(model, one) if isinstance(model, ExportedProgram) else copy.deepcopy(model)
            exported = torch.export.export(_contiguous(module), args, kwargs)
            edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            if int8:
                _require_integer_kernels(edge.exported_program().graph_module)
            lowered = edge.to_executorch()
        data = bytes(lowered.buffer)
        names = [name for name, _ in trees.named_leaves(example)]
        outputs = output_names(model, example)
        call = open_program(data, outputs)
    except (*FAILURES, ExportError, InternalError, torch._dynamo.exc.TorchDynamoException) as error:
        raise LoweringUnavailable(f"ExecuTorch cannot lower this model: {first_line(error)}") from error

    # For a batch of one. The outputs lie in the method's memory: it is kept until they are copied.
    taken = ", ".join("images" if not name else f"inputs[{name!r}]" for name in names)
    given = f"method.execute([torch.from_numpy(each) for each in ({taken},)])"
    returned = f"{given}[0].clone()" if outputs == [""] else f"[each.clone() for each in {given}]"
    usage = (
        "import torch; from executorch.runtime import Runtime; program = Runtime.get().load_program(FILE); "
        f"method = program.load_method('forward'); {returned}"
    )
    return Written({"pte": data}, call, runtime(), usage)


def runtime() -> str:
    """Returns the runtime's name and version."""
    return f"executorch {version('executorch')}"


def open_program(data: bytes, outputs: Sequence[str] = ("",)) -> Call:
    """Opens the bytes of a `.pte` for a batch of one, as a function for any batch: one row after the other.

    outputs: names of the model's outputs.
    """
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(data)
    return by_rows(program.load_method("forward"), outputs, (data, program))


def by_rows(method: Any, outputs: Sequence[str], kept: object = None) -> Call:
    """Returns a method of a `.pte` as a function for any batch.

    kept: the method reads the program's bytes in place and holds no reference. Freeing them would crash the process.
    """

    def call(inputs: Tree, kept: object = kept) -> Tree:
        found = []
        for row in range(trees.rows_of(inputs)):
            leaves = trees.leaves(trees.take(inputs, slice(row, row + 1)))
            # Cloned, as the next call overwrites the runtime's outputs.
            found.append([each.clone() for each in method.execute([leaf.contiguous() for leaf in leaves])])
        return tree_of(outputs, [torch.cat(each) for each in zip(*found, strict=True)])

    return call


def _contiguous(module: nn.Module) -> nn.Module:
    """Makes all tensors contiguous, in place. XNNPACK's passes choose a layout for each layer themselves.

    They fail where a convolution's weight is channels_last: its layout is then settled before the layer asks for one.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.contiguous()
    return module


def _require_integer_kernels(edge: GraphModule) -> None:
    """Raises LoweringUnavailable for layers that XNNPACK left in float: their weights are dequantized outside of it."""
    left = [node for node in edge.graph.nodes if "dequantize_per_channel" in str(node.target)]
    if left:
        depthwise = sum(1 for node in left for layer in node.users if layer.args[-1] not in (1, None))
        raise LoweringUnavailable(
            f"XNNPACK has no integer kernel for {len(left)} of the layers with int8 weights, "
            f"{depthwise} of them grouped convolutions, as what follows takes floats "
            "(Hardswish, SiLU, a skipped layer): skip them too by qat.rules, or write fp32 as .pte, "
            "or int8 as onnx or openvino"
        )
