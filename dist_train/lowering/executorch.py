"""ExecuTorch: a `.pte` for phones and small devices, with XNNPACK's kernels."""

from __future__ import annotations

import copy
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from dist_train.errors import first_line
from dist_train.lowering.base import FAILURES, LoweringUnavailable, Written, quiet
from dist_train.lowering.rewrites.xnnpack import for_xnnpack


def write(model: nn.Module | ExportedProgram, example: Tensor, threads: int) -> Written:
    """Writes `model.pte` for a batch of one, as ExecuTorch plans its memory ahead; its Python runtime reads it back.

    Args:
        model: a float or half model in eval mode, or an int8 program.
        example: float32 [B, C, H, W]; only its shape counts.
        threads: ignored; XNNPACK uses all of the device's.

    Raises:
        LoweringUnavailable: ExecuTorch cannot lower the model, or XNNPACK has no integer kernel for a layer with int8
            weights. Float arithmetic behind portable dequantize kernels would not be an int8 model.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.error import ExportError, InternalError
    from executorch.runtime import Runtime

    one = torch.zeros(1, *example.shape[1:])
    try:
        with quiet(), torch.no_grad():
            int8 = isinstance(model, ExportedProgram)
            module = for_xnnpack(model, one) if isinstance(model, ExportedProgram) else copy.deepcopy(model)
            exported = torch.export.export(_contiguous(module), (one,))
            edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            if int8:
                _require_integer_kernels(edge.exported_program().graph_module)
            lowered = edge.to_executorch()
        data = bytes(lowered.buffer)
        program = Runtime.get().load_program(data)
        method = program.load_method("forward")
    except (*FAILURES, ExportError, InternalError, torch._dynamo.exc.TorchDynamoException) as error:
        raise LoweringUnavailable(f"ExecuTorch cannot lower this model: {first_line(error)}") from error

    # `kept`: the method reads the program's bytes in place and holds no reference. Freeing them would crash the
    # process.
    def call(images: Tensor, kept: object = (data, program)) -> Tensor:
        # Cloned, as the next call overwrites the runtime's outputs.
        return torch.cat([method.execute((image.contiguous(),))[0].clone() for image in images.split(1)])

    # For a batch of one. The outputs lie in the method's memory: it is kept until they are copied.
    usage = (
        "import torch; from executorch.runtime import Runtime; program = Runtime.get().load_program(FILE); "
        "method = program.load_method('forward'); method.execute((torch.from_numpy(images),))[0].clone()"
    )
    return Written({"pte": data}, call, f"executorch {version('executorch')}", usage)


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
