"""ONNX: written by torch.onnx, read back by ONNX Runtime."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from dist_train import trees
from dist_train.errors import first_line
from dist_train.lowering.base import FAILURES, Call, LoweringUnavailable, Written, quiet
from dist_train.programs.pt2 import export_program
from dist_train.programs.signature import Dynamic, output_names, plain_outputs, rows, runtime_names, tree_of
from dist_train.trees import Tree

_KEPT = 2  # number of models whose ONNX is kept for the next runtime: fp32 and int8
_kept: dict[tuple[int, object, str], bytes] = {}
INPUT, OUTPUT = "input", "logits"  # names where there is one


def onnx_bytes(model: nn.Module | ExportedProgram, example: Tree, dynamic: Dynamic | None = None) -> bytes:
    """Exports the model as ONNX with a dynamic batch: QDQ for a converted model, float for a float one in eval mode.

    Every runtime asks for it again, and tracing hundreds of nodes takes seconds. The newest results are kept: of an
    exported program for any that is equal, as the gate of `convert` and the stage `export` each read the same bytes;
    of a module, whose code cannot be compared, while it lives and has the same values.

    Args:
        example: real rows [B, ...]; of floats only the shape and dtype count.
        dynamic: dimensions that vary besides the batch; a program has its own.

    Raises:
        LoweringUnavailable: the model cannot be exported; with the first line of torch's reason.
    """
    program = isinstance(model, ExportedProgram)
    shapes = tuple((name, leaf.shape[1:]) for name, leaf in trees.named_leaves(example))
    key = (0 if program else id(model), shapes, _digest(model))
    if key in _kept:
        return _kept[key]
    data = _export(model, example, dynamic)
    while len(_kept) >= _KEPT:
        del _kept[next(iter(_kept))]
    _kept[key] = data
    if not program:
        weakref.finalize(model, _kept.pop, key, None)  # its address may become another's
    return data


def _digest(model: nn.Module | ExportedProgram) -> str:
    """Hashes the graph and all tensors: equal for equal programs, and another one if a module is changed in place."""
    if isinstance(model, ExportedProgram):
        text = f"{model.graph} {model.graph_signature} {model.range_constraints}"
        values = {**model.state_dict, **model.constants}
    else:
        text = f"{model} {getattr(model, 'code', '')}"
        values = dict([*model.named_parameters(), *model.named_buffers()])
    digest = hashlib.blake2b(text.encode())
    for name, value in values.items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _export(model: nn.Module | ExportedProgram, example: Tree, dynamic: Dynamic | None = None) -> bytes:
    from dist_train.lowering.rewrites.onnx_qdq import quantize_summands, read_joined

    try:
        with quiet(), torch.no_grad():
            proto = _program(model, example, dynamic).model_proto
    except (*FAILURES, torch._dynamo.exc.TorchDynamoException) as error:  # OnnxExporterError is a RuntimeError
        raise LoweringUnavailable(f"torch.onnx.export cannot export this model: {first_line(error)}") from error
    quantize_summands(proto)
    read_joined(proto)
    return proto.SerializeToString()


def _program(model: nn.Module | ExportedProgram, example: Tree, dynamic: Dynamic | None) -> Any:
    # Two rows, because torch.export makes a batch of one a constant.
    args, kwargs = trees.arguments(rows(example, 2))
    names = [name for name, _ in trees.named_leaves(example)]
    outputs = output_names(model, example)
    shapes: dict[str, Any] = {}
    if isinstance(model, nn.Module) and names == outputs == [""] and not dynamic:
        shapes = {"dynamic_shapes": ({0: Dim("batch", min=1)},)}
    elif isinstance(model, nn.Module):
        model = export_program(plain_outputs(model, trees.call(model, rows(example, 2))), example, dynamic)
    program = torch.onnx.export(
        model,
        args,
        kwargs=kwargs,
        dynamo=True,
        verbose=False,
        input_names=runtime_names(names, INPUT),
        output_names=runtime_names(outputs, OUTPUT),
        **shapes,
    )
    assert program is not None  # it is, with dynamo=True
    return program


def write(model: nn.Module | ExportedProgram, example: Tree, threads: int, dynamic: Dynamic | None = None) -> Written:
    """Writes `model.onnx` with the weights inside and a dynamic batch size; input `input`, output `logits`.

    Inputs and outputs of a tree have the names of its leaves. Arguments and errors as of `onnx_bytes`. The result's
    `call` runs the written file in ONNX Runtime.
    """
    data = onnxruntime_bytes(model, example, dynamic)
    outputs = output_names(model, example)
    call, runtime = open_onnx(data, threads, outputs)
    session = "import onnxruntime; onnxruntime.InferenceSession(FILE)"
    found = f"{session}.run(None, {fed(example)})"
    return Written({"onnx": data}, call, runtime, f"{found}[0]" if outputs == [""] else found)


def fed(example: Tree) -> str:
    """Returns Python for the arrays that a runtime takes by name: of `images`, or of the dict `inputs` by leaf name."""
    names = [name for name, _ in trees.named_leaves(example)]
    taken = ["images" if not name else f"inputs[{name!r}]" for name in names]
    pairs = zip(runtime_names(names, INPUT), taken, strict=True)
    return f"{{{', '.join(f'{name!r}: {each}' for name, each in pairs)}}}"


def onnxruntime_bytes(model: nn.Module | ExportedProgram, example: Tree, dynamic: Dynamic | None = None) -> bytes:
    """Exports as `onnx_bytes`, with biases in int32, which ONNX Runtime needs to compute in integers."""
    import onnx

    from dist_train.lowering.rewrites.onnx_qdq import quantize_biases

    proto = onnx.load_from_string(onnx_bytes(model, example, dynamic))
    quantize_biases(proto)
    data: bytes = proto.SerializeToString()
    return data


def open_onnx(data: bytes, threads: int, outputs: Sequence[str] = ("",)) -> tuple[Call, str]:
    """Opens an ONNX model in ONNX Runtime.

    outputs: names of the model's outputs, as of `output_names`.

    Returns:
        The model, inputs [B, ...] to outputs, for any B >= 1; and the runtime's name and version.

    Raises:
        LoweringUnavailable: it cannot run the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Else its threads would spin while the next runtime is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors only; users cannot act on warnings about its optimizations
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except _onnxruntime_errors() as error:
        raise LoweringUnavailable(f"ONNX Runtime cannot run this model: {first_line(error)}") from error

    def call(inputs: Tree) -> Tree:
        return tree_of(outputs, [torch.from_numpy(each) for each in session.run(None, arrays_of(inputs))])

    return call, f"onnxruntime {onnxruntime.__version__}"


def arrays_of(inputs: Tree) -> dict[str, Any]:
    """Returns the NumPy arrays of a tree of inputs by the names that they have in ONNX."""
    named = trees.named_leaves(inputs)
    names = runtime_names([name for name, _ in named], INPUT)
    return {name: leaf.contiguous().numpy() for name, (_, leaf) in zip(names, named, strict=True)}


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    """Returns the errors for a model that it cannot run. They have no common base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (state.InvalidGraph, state.NotImplemented, state.Fail, state.RuntimeException, state.InvalidArgument)
