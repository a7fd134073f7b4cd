"""Rewriting of PT2E's int8 programs for XNNPACK's integer kernels: int8 activations, quantized outputs of all layers.

PT2E's quantizer for x86 makes activations uint8. It leaves the last layer's output, and convolutions that end in a
residual addition, in floating point. ExecuTorch's partitioner takes a layer in integers in two cases only: its output
is quantized too, or its input is quantized from the range of each row ("dynamically").
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from dist_train import trees
from dist_train.lowering.base import LoweringUnavailable
from dist_train.lowering.rewrites.kernel_arithmetic import scale_and_zero_point, summand_range, with_room_for_bias
from dist_train.lowering.rewrites.quantized_graph import dequantized_weights, value_of
from dist_train.trees import Tree

_aten = torch.ops.aten
_LAYERS = (_aten.conv2d.default, _aten.linear.default)
_CLAMPS = (_aten.relu.default, _aten.relu_.default, _aten.hardtanh.default, _aten.hardtanh_.default)  # run in the layer
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor)
_RELUS = _CLAMPS[:2]
_MOVES = (
    _aten.flatten.using_ints,
    _aten.view.default,
    _aten.reshape.default,
    _aten.permute.default,
    _aten.transpose.int,
)
_DROPOUTS = (_aten.dropout.default, _aten.dropout_.default)
_LOW, _HIGH = -128, 127
_Parameters = tuple[float, int]


def for_xnnpack(program: ExportedProgram, one: Tree) -> GraphModule:
    """Rewrites the program for a batch of one, for ExecuTorch's XNNPACK partitioner. `program` is not changed.

    The integers represent the same real numbers as before, with two exceptions: residual summands, and inputs of layers
    with floating-point outputs, are rounded once more.

    Args:
        one: one row; of floats only the shape counts.

    Raises:
        LoweringUnavailable: weights have zero points, or integers fewer than 8 bits: XNNPACK has no kernels for them.
    """
    own = copy.deepcopy(program.module(check_guards=False))  # its tensors are changed below, and are the program's
    args, kwargs = trees.arguments(one)
    graph = torch.export.export(own, args, kwargs).module(check_guards=False)
    assert isinstance(graph, GraphModule)
    for node in _calls(graph, *_DROPOUTS):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.graph.erase_node(node)
    _give_channels_scales(graph)
    for node in list(_calls(graph, _quantize(), _dequantize())):
        _shift(node)
    _keep_scales_of_moves(graph)
    _quantize_summands(graph)
    _make_room_for_biases(graph)
    _quantize_inputs_of_float_outputs(graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def _quantize() -> object:
    return torch.ops.quantized_decomposed.quantize_per_tensor.default


def _dequantize() -> object:
    return torch.ops.quantized_decomposed.dequantize_per_tensor.default


def _calls(graph: GraphModule, *targets: object) -> Iterator[Node]:
    return (node for node in list(graph.graph.nodes) if node.op == "call_function" and node.target in targets)


def _is(node: object, *targets: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def _give_channels_scales(graph: GraphModule) -> None:
    """Gives each weight a scale per channel, which dynamic layers need; one scale for all is repeated."""
    for place, (node, weight, scale, zero_point) in enumerate(dequantized_weights(graph)):
        if torch.as_tensor(zero_point).any():
            raise LoweringUnavailable(
                "XNNPACK has no kernels for weights with zero points (scheme affine in qat.rules), "
                f"as {node.args[0]} has"
            )
        if tuple(node.args[-3:-1]) != (_LOW, _HIGH):
            raise LoweringUnavailable(
                f"XNNPACK has no kernels for the {node.args[-3:-1]} of {node.args[0]}: 8 bits only"
            )
        if _is(node, _dequantize()):
            channels = weight.shape[0]
            graph.register_buffer(f"_xnnpack_scale_{place}", torch.as_tensor(scale).float().expand(channels).clone())
            graph.register_buffer(f"_xnnpack_zero_point_{place}", torch.zeros(channels, dtype=torch.int64))
            with graph.graph.inserting_before(node):
                parts = [graph.graph.get_attr(f"_xnnpack_{part}_{place}") for part in ("scale", "zero_point")]
                node.args = (node.args[0], *parts, 0, *node.args[-3:])
            node.target = torch.ops.quantized_decomposed.dequantize_per_channel.default


def _shift(node: Node) -> None:
    """Changes an activation from uint8 to int8 with the same real numbers."""
    source, scale, zero_point, low, high, dtype = node.args
    if dtype == torch.int8:
        return
    if (low, high, dtype) != (0, 255, torch.uint8):
        raise LoweringUnavailable(f"XNNPACK has no kernels for activations of {low}..{high}: 8 bits only")
    node.args = (source, scale, zero_point + _LOW, _LOW, _HIGH, torch.int8)  # type: ignore[operator]


def _insert(graph: GraphModule, source: Node, reader: Node, parameters: _Parameters) -> None:
    """Quantizes and dequantizes `source` for `reader`."""
    rest = (*parameters, _LOW, _HIGH, torch.int8)
    with graph.graph.inserting_before(reader):
        integers = graph.graph.call_function(_quantize(), (source, *rest))  # type: ignore[arg-type]
        floats = graph.graph.call_function(_dequantize(), (integers, *rest))  # type: ignore[arg-type]
        reader.replace_input_with(source, floats)


def _parameters(node: Node) -> _Parameters:
    return node.args[1], node.args[2]  # type: ignore[return-value]


def _range(node: Node) -> tuple[float, float]:
    scale, zero_point = _parameters(node)
    return scale * (_LOW - zero_point), scale * (_HIGH - zero_point)


def _keep_scales_of_moves(graph: GraphModule) -> None:
    """Adds Q/DQ pairs around operations that move numbers, which XNNPACK needs to keep their scale. This is exact.

    A tensor that is quantized only after such an operation is quantized before it as well, so that the layer before has
    a quantized output.
    """
    moves = list(_calls(graph, *_MOVES))
    for move in moves:
        source = move.args[0]
        if not _is(source, _dequantize()):
            continue
        parameters = _parameters(source)  # type: ignore[arg-type]
        for reader in list(move.users):
            if _is(reader, *_MOVES) or (_is(reader, _quantize()) and _parameters(reader) != parameters):
                _insert(graph, move, reader, parameters)
    for move in reversed(moves):
        source, readers = move.args[0], list(move.users)
        if len(readers) == 1 and _is(readers[0], _quantize()) and not _is(source, _dequantize()):
            _insert(graph, source, move, _parameters(readers[0]))  # type: ignore[arg-type]


def _after(node: Node, *passed: object) -> Node | None:
    """Returns the only reader of a node, or of the clamp behind it; None where there are several."""
    readers = list(node.users)
    if len(readers) == 1 and _is(readers[0], *passed):
        readers = list(readers[0].users)
    return readers[0] if len(readers) == 1 else None


def _quantize_summands(graph: GraphModule) -> None:
    """As `onnx_qdq.quantize_summands`."""
    for addition in _calls(graph, *_SUMS):
        after = _after(addition, *_RELUS)
        layers = [each for each in addition.args[:2] if _is(each, *_LAYERS)]
        others = [each for each in addition.args[:2] if _is(each, _dequantize())]
        if not _is(after, _quantize()) or len(layers) != 1 or len(others) != 1:
            continue
        if len(layers[0].users) != 1:  # type: ignore[union-attr]
            continue
        values = summand_range(_range(after), _range(others[0]))  # type: ignore[arg-type]
        _insert(graph, layers[0], addition, scale_and_zero_point(values, _LOW, _HIGH))  # type: ignore[arg-type]


def _int8_layers(graph: GraphModule) -> Iterator[tuple[Node, Node, Node]]:
    """Yields layer, dequantized input and dequantized weight."""
    per_channel = torch.ops.quantized_decomposed.dequantize_per_channel.default
    for layer in _calls(graph, *_LAYERS):
        if _is(layer.args[0], _dequantize()) and _is(layer.args[1], per_channel):
            yield layer, layer.args[0], layer.args[1]  # type: ignore[misc]


def _make_room_for_biases(graph: GraphModule) -> None:
    for layer, inputs, weight in _int8_layers(graph):
        bias = value_of(graph, layer.args[2]) if len(layer.args) > 2 else None
        if bias is None or len(weight.users) > 1:
            continue
        integers, scales = (value_of(graph, each) for each in weight.args[:2])
        assert integers is not None and scales is not None
        weights, steps, biases = (each.detach().numpy() for each in (integers, scales, bias))
        changed = with_room_for_bias(weights, steps, biases, _parameters(inputs)[0])
        for kept, array in zip((integers, scales), changed, strict=True):
            kept.copy_(torch.as_tensor(array))


def _quantize_inputs_of_float_outputs(graph: GraphModule) -> None:
    """Quantizes dynamically the inputs of layers without a quantized output, such as the last layer."""
    library = torch.ops.quantized_decomposed
    for layer, inputs, _ in _int8_layers(graph):
        if _is(_after(layer, *_CLAMPS), _quantize()):
            continue
        with graph.graph.inserting_before(layer):
            call = graph.graph.call_function
            found = call(
                library.choose_qparams.tensor, (inputs, _LOW, _HIGH, torch.finfo(torch.float32).eps, torch.int8)
            )
            rest = (call(operator.getitem, (found, 0)), call(operator.getitem, (found, 1)), _LOW, _HIGH, torch.int8)
            integers = call(library.quantize_per_tensor.tensor, (inputs, *rest))
            layer.replace_input_with(inputs, call(library.dequantize_per_tensor.tensor, (integers, *rest)))
