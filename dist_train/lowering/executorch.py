"""ExecuTorch: a `.pte` for phones and small devices, with XNNPACK's kernels."""

from __future__ import annotations

from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dist_train.lowering.base import LoweringUnavailable, Written, quiet


def write(model: nn.Module | ExportedProgram, example: Tensor, threads: int) -> Written:
    """`model.pte` for a batch of one, as ExecuTorch plans its memory ahead; its Python runtime reads it back.

    model: a float or half model in eval mode. example: float32 [B, C, H, W], for its shape. threads: ignored; XNNPACK
        takes what the device has.

    Raises LoweringUnavailable for an int8 program: PT2E's quantizer for x86 makes activations of uint8, and XNNPACK's
    integer kernels want int8 activations, placed by its own quantizer. What is left is float arithmetic between portable
    quantize and dequantize kernels: larger, slower, and no int8 model. Also where ExecuTorch cannot lower the model.
    """
    if isinstance(model, ExportedProgram):
        raise LoweringUnavailable(
            "ExecuTorch cannot take this int8 program: it has uint8 activations, for the integer kernels of x86, and XNNPACK's "
            "want int8 ones; write fp32 or half as .pte, or int8 as onnx or openvino"
        )
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    one = torch.zeros(1, *example.shape[1:])
    try:
        with quiet(), torch.no_grad():
            exported = torch.export.export(model, (one,))
            lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
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
