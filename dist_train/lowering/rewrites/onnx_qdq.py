"""Rewriting of QDQ graphs to a form that runtimes fuse: layers that PT2E leaves in float are quantized too.

PT2E's quantizer for x86 leaves a convolution that ends in a residual addition in float, as oneDNN adds inside the
convolution. ONNX Runtime has no such kernel: it ran 8 of ResNet-18's 20 convolutions in float, and int8 was slower than
FP32. OpenVINO ran the convolution in integers, but the addition apart from it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from dist_train.lowering.rewrites.kernel_arithmetic import scale_and_zero_point, summand_range, with_room_for_bias


class _Graph:
    """A model's nodes, by their inputs and outputs."""

    def __init__(self, model: ModelProto) -> None:
        self.proto = model.graph
        self.values = {each.name: each for each in self.proto.initializer}
        self.maker = {output: node for node in self.proto.node for output in node.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.proto.node:
            for name in node.input:
                self.readers[name].append(node)
        self.results = {output.name for output in self.proto.output}

    def value(self, name: str) -> Any:
        return numpy_helper.to_array(self.values[name])

    def made_by(self, name: str, operator: str) -> NodeProto | None:
        node = self.maker.get(name)
        return node if node is not None and node.op_type == operator else None

    def only_reader(self, name: str) -> NodeProto | None:
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 and name not in self.results else None

    def constant(self, name: str, value: Any) -> str:
        self.values[name] = numpy_helper.from_array(value, name)
        self.proto.initializer.append(self.values[name])
        return name

    def replace(self, name: str, value: Any) -> None:
        self.values[name].CopyFrom(numpy_helper.from_array(value, name))

    def insert(self, before: NodeProto, *nodes: NodeProto) -> None:
        place = next(index for index, node in enumerate(self.proto.node) if node is before)
        for offset, node in enumerate(nodes):
            self.proto.node.insert(place + offset, node)


def quantize_summands(model: ModelProto) -> int:
    """Quantizes each convolution's output that is added to a quantized tensor and whose sum is quantized, in place.

    The range is from `summand_range`. Returns the number of outputs.
    """
    graph, count = _Graph(model), 0
    for addition in [node for node in graph.proto.node if node.op_type == "Add"]:
        summands = [graph.maker.get(name) for name in addition.input]
        kinds = [None if node is None else node.op_type for node in summands]
        after = graph.only_reader(addition.output[0])
        if after is not None and after.op_type == "Relu":
            after = graph.only_reader(after.output[0])
        if (
            sorted(map(str, kinds)) != ["Conv", "DequantizeLinear"]
            or after is None
            or after.op_type != "QuantizeLinear"
        ):
            continue
        place = kinds.index("Conv")
        name, other = addition.input[place], summands[1 - place]
        if graph.only_reader(name) is None or not (_per_tensor(graph, other) and _per_tensor(graph, after)):
            continue
        integers = np.iinfo(graph.value(after.input[2]).dtype)
        values = summand_range(_range(graph, after), _range(graph, other))
        scale, zero_point = scale_and_zero_point(values, int(integers.min), int(integers.max))
        parameters = [
            graph.constant(f"{name}_scale", np.float32(scale)),
            graph.constant(f"{name}_zero_point", np.asarray(zero_point, integers.dtype)),
        ]
        quantize = helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}_quantized"])
        dequantize = helper.make_node("DequantizeLinear", [f"{name}_quantized", *parameters], [f"{name}_dequantized"])
        addition.input[place] = f"{name}_dequantized"
        graph.insert(addition, quantize, dequantize)
        count += 1
    return count


def read_joined(model: ModelProto) -> int:
    """Removes the second quantization between a concatenation of tensors with one grid and a batch norm, in place.

    It has the same grid, so the numbers stay equal. OpenVINO 2026.4 crashes with a segmentation fault when it compiles
    this second quantization, which every DenseNet has. Returns the number of batch norms.
    """
    graph, count = _Graph(model), 0
    for norm in [node for node in graph.proto.node if node.op_type == "BatchNormalization"]:
        after = graph.made_by(norm.input[0], "DequantizeLinear")
        quantized = after and graph.made_by(after.input[0], "QuantizeLinear")
        joined = quantized and graph.made_by(quantized.input[0], "Concat")
        if after is None or quantized is None or joined is None:
            continue
        parts = [graph.made_by(name, "DequantizeLinear") for name in joined.input]
        ends = [quantized, after, *parts]
        if all(end is not None and _per_tensor(graph, end) and _same_grid(graph, end, quantized) for end in ends):
            norm.input[0] = joined.output[0]
            count += 1
    _drop_unread(graph)
    return count


def _same_grid(graph: _Graph, one: NodeProto, other: NodeProto) -> bool:
    pairs = zip(one.input[1:], other.input[1:], strict=True)
    return all(np.array_equal(graph.value(left), graph.value(right)) for left, right in pairs)


def _per_tensor(graph: _Graph, node: Any) -> bool:
    return (
        len(node.input) == 3
        and all(name in graph.values for name in node.input[1:])
        and graph.value(node.input[1]).size == 1
    )


def _range(graph: _Graph, node: Any) -> tuple[float, float]:
    """Returns the lowest and the highest number that a Q or DQ node can represent."""
    scale, zero_point = graph.value(node.input[1]).item(), graph.value(node.input[2])
    integers = np.iinfo(zero_point.dtype)
    return scale * (integers.min - zero_point.item()), scale * (integers.max - zero_point.item())


def quantize_biases(model: ModelProto) -> int:
    """Quantizes the bias of each layer with quantized input and weight to int32, in place, as kernels add it.

    Its scale is the input's times the weight's; see `with_room_for_bias`. Returns the number of biases.
    """
    graph, count = _Graph(model), 0
    for layer in [node for node in graph.proto.node if node.op_type in ("Conv", "Gemm") and len(node.input) == 3]:
        inputs, weight = (graph.made_by(name, "DequantizeLinear") for name in layer.input[:2])
        bias = layer.input[2]
        if inputs is None or weight is None or not _per_tensor(graph, inputs) or bias not in graph.values:
            continue
        if any(name not in graph.values or len(graph.readers[name]) > 1 for name in weight.input[:2]):
            continue
        input_scale = graph.value(inputs.input[1]).item()
        values, weights, scales = (graph.value(name) for name in (bias, *weight.input[:2]))
        if scales.shape != values.shape or scales.shape != weights.shape[:1] or graph.value(weight.input[2]).any():
            continue
        roomy, enough = with_room_for_bias(weights, scales, values, input_scale)
        if enough is not scales:
            graph.replace(weight.input[0], roomy)
            graph.replace(weight.input[1], enough)
        scale = (enough * np.float32(input_scale)).astype(np.float32)
        name = f"{layer.output[0]}_bias"
        parts = [
            graph.constant(f"{name}_int32", np.round(values / scale.astype(np.float64)).astype(np.int32)),
            graph.constant(f"{name}_scale", scale),
            graph.constant(f"{name}_zero_point", np.zeros(scale.shape, np.int32)),
        ]
        layer.input[2] = f"{name}_dequantized"
        graph.insert(layer, helper.make_node("DequantizeLinear", parts, [layer.input[2]], axis=0))
        count += 1
    _drop_unread(graph)
    return count


def _drop_unread(graph: _Graph) -> None:
    """Removes nodes and constants that nothing reads."""
    read = set(graph.results)
    for node in reversed(list(graph.proto.node)):
        if read.isdisjoint(node.output):
            graph.proto.node.remove(node)
        else:
            read.update(node.input)
    for unread in [each for each in graph.proto.initializer if each.name not in read]:
        graph.proto.initializer.remove(unread)
