"""ExecuTorch: a `.pte` for phones and small devices, with XNNPACK's kernels."""

from __future__ import annotations

from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from dist_train.lowering.base import LoweringUnavailable, Written, quiet
from dist_train.lowering.rewrites.xnnpack import for_xnnpack


def write(model: nn.Module | ExportedProgram, example: Tensor, threads: int) -> Written:
    """`model.pte` for a batch of one, as ExecuTorch plans its memory ahead; its Python runtime reads it back.

    model: a float or half model in eval mode, or an int8 program. example: float32 [B, C, H, W], for its shape. threads:
        ignored; XNNPACK takes what the device has.

    Raises LoweringUnavailable where ExecuTorch cannot lower the model; of an int8 program also where a layer with int8 weights
    would not run in XNNPACK's integer kernels: float arithmetic behind portable dequantize kernels is no int8 model.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    one = torch.zeros(1, *example.shape[1:])
    try:
        with quiet(), torch.no_grad():
            int8 = isinstance(model, ExportedProgram)
            exported = torch.export.export(
                for_xnnpack(model, one) if isinstance(model, ExportedProgram) else model, (one,)
            )
            edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            if int8:
                _require_integer_kernels(edge.exported_program().graph_module)
            lowered = edge.to_executorch()
        data = bytes(lowered.buffer)
        program = Runtime.get().load_program(data)
        method = program.load_method("forward")
    except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LoweringUnavailable(f"ExecuTorch cannot lower this model: {reason}") from error

    # `kept`: the method reads the program's bytes where they lie, and holds no reference; freed, they end the process.
    def call(images: Tensor, kept: object = (data, program)) -> Tensor:
        # Cloned: the runtime's outputs lie in its own memory, which the next call overwrites.
        return torch.cat([method.execute((image.contiguous(),))[0].clone() for image in images.split(1)])

    usage = (
        "executorch.runtime.Runtime.get().load_program(FILE).load_method('forward').execute((image,)), a batch of one"
    )
    return Written({"pte": data}, call, f"executorch {version('executorch')}", usage)


def _require_integer_kernels(edge: GraphModule) -> None:
    """XNNPACK took a layer in integers if the operator that dequantizes its weight went with it."""
    left = [node for node in edge.graph.nodes if "dequantize_per_channel" in str(node.target)]
    if left:
        depthwise = sum(1 for node in left for layer in node.users if layer.args[-1] not in (1, None))
        raise LoweringUnavailable(
            f"XNNPACK has no integer kernel for {len(left)} of the layers with int8 weights, {depthwise} of them grouped convolutions, "
            "as what follows takes floats (Hardswish, SiLU, a skipped layer): skip them too by qat.rules, or write fp32 as .pte, or "
            "int8 as onnx or openvino"
        )
