"""An int8 program of PT2E in the form that XNNPACK runs in integers: int8 activations, and every int8 layer's output quantized.

PT2E's quantizer for x86 makes activations of uint8, leaves a convolution that ends in a residual addition in floating point, and
the last layer's output too. ExecuTorch's partitioner takes a layer in integers only where its output is quantized as well, or where
its input is quantized anew from the range of each row ("dynamically"), which needs no range of the output.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from dist_train.lowering.base import LoweringUnavailable
from dist_train.lowering.rewrites.kernel_arithmetic import scale_and_zero_point, summand_range, with_room_for_bias
from dist_train.lowering.rewrites.quantized_graph import dequantized_weights, value_of

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


def for_xnnpack(program: ExportedProgram, one: Tensor) -> GraphModule:
    """The program for a batch of one, for ExecuTorch's XNNPACK partitioner; `program` is not changed.

    one: float32 [1, C, H, W], for its shape. The real numbers that integers stand for stay what they were, except that a residual
    summand is rounded once more, and that the input of a layer whose output is floating point is.

    Raises LoweringUnavailable for weights with zero points, which XNNPACK has no kernels for, and for integers of less than 8 bits.
    """
    graph = torch.export.export(program.module(check_guards=False), (one,)).module(check_guards=False)
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
    """Each weight gets a scale for each channel, as dynamic layers want one; where there was one for all, equal ones."""
    for place, (node, weight, scale, zero_point) in enumerate(dequantized_weights(graph)):
        if torch.as_tensor(zero_point).any():
            raise LoweringUnavailable(
                f"XNNPACK has no kernels for weights with zero points (scheme affine in qat.rules), as {node.args[0]} has"
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
    """The uint8 of an activation as int8, of the same real numbers."""
    source, scale, zero_point, low, high, dtype = node.args
    if dtype == torch.int8:
        return
    if (low, high, dtype) != (0, 255, torch.uint8):
        raise LoweringUnavailable(f"XNNPACK has no kernels for activations of {low}..{high}: 8 bits only")
    node.args = (source, scale, zero_point + _LOW, _LOW, _HIGH, torch.int8)  # type: ignore[operator]


def _insert(graph: GraphModule, source: Node, reader: Node, parameters: _Parameters) -> None:
    """`reader` gets `source` quantized and dequantized."""
    rest = (*parameters, _LOW, _HIGH, torch.int8)
    with graph.graph.inserting_before(reader):
        integers = graph.graph.call_function(_quantize(), (source, *rest))  # type: ignore[arg-type]
        reader.replace_input_with(source, graph.graph.call_function(_dequantize(), (integers, *rest)))  # type: ignore[arg-type]


def _parameters(node: Node) -> _Parameters:
    return node.args[1], node.args[2]  # type: ignore[return-value]


def _range(node: Node) -> tuple[float, float]:
    scale, zero_point = _parameters(node)
    return scale * (_LOW - zero_point), scale * (_HIGH - zero_point)


def _keep_scales_of_moves(graph: GraphModule) -> None:
    """XNNPACK moves integers only where they mean the same afterwards: another scale is for the next Q/DQ pair. Exact.

    What is quantized only after it was moved is quantized before as well, so that what made it has a quantized output.
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
    """The only reader of a node, or of what clamps it in place; None where there are several."""
    readers = list(node.users)
    if len(readers) == 1 and _is(readers[0], *passed):
        readers = list(readers[0].users)
    return readers[0] if len(readers) == 1 else None


def _quantize_summands(graph: GraphModule) -> None:
    """As `qdq.quantize_summands` does in ONNX."""
    for addition in _calls(graph, *_SUMS):
        after = _after(addition, *_RELUS)
        layers = [each for each in addition.args[:2] if _is(each, *_LAYERS)]
        others = [each for each in addition.args[:2] if _is(each, _dequantize())]
        if not _is(after, _quantize()) or len(layers) != 1 or len(others) != 1 or len(layers[0].users) != 1:  # type: ignore[union-attr]
            continue
        values = summand_range(_range(after), _range(others[0]))  # type: ignore[arg-type]
        _insert(graph, layers[0], addition, scale_and_zero_point(values, _LOW, _HIGH))  # type: ignore[arg-type]


def _int8_layers(graph: GraphModule) -> Iterator[tuple[Node, Node, Node]]:
    """Layer, dequantized input, dequantized weight."""
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
    """A layer whose output nothing quantizes: the last one, or one before an operator that takes floats."""
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
