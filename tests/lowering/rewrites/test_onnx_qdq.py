"""The QDQ that is written: every convolution in integer kernels, in ranges that clip nothing, with biases that fit."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tests.support.converted_nets import converted_net, images, program_of
from tests.support.overflow import needs_vnni

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from dist_train.lowering import onnx as onnx_module  # noqa: E402
from dist_train.lowering.onnx import onnx_bytes, write  # noqa: E402
from dist_train.lowering.rewrites.onnx_qdq import quantize_biases  # noqa: E402

pytestmark = pytest.mark.heavy


class Residual(nn.Module):
    """Two residual additions, one with ReLU behind it and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(width, 8, 3, padding=1) for width in (3, 8, 8))
        self.last = nn.Conv2d(8, 10, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.first(x)
        x = (x + self.second(x)).relu()
        return self.last(x).flatten(1)


@pytest.fixture(scope="module")
def residual() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Residual().eval()
    return converted_net(net)


def operators_that_run(data: bytes, folder: Path) -> Counter[str]:
    """Counts the operators of a model after ONNX Runtime's optimizations."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_convolutions_that_end_in_a_residual_addition_run_in_integers(residual: nn.Module, tmp_path: Path) -> None:
    ran = operators_that_run(write(residual, images(2), 1).files["onnx"], tmp_path)
    assert (ran["QLinearConv"], ran["QLinearAdd"]) == (3, 2)
    assert ran["Conv"] + ran["FusedConv"] == 1  # the last one, whose output nobody quantizes
    assert "Add" not in ran


@needs_vnni
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_summands_are_not_clipped_also_where_sums_are(residual: nn.Module, scale: float) -> None:
    call = write(residual, images(2), 1).call
    inputs = scale * (images(64) - 0.5)
    with torch.no_grad():
        expected = residual(inputs)
    assert (call(inputs) - expected).abs().max() < 0.05 * expected.abs().max()


def one_layer(weight_scale: list[float], weight: list[int], bias: list[float]) -> onnx.ModelProto:
    """y = conv1x1(x), two output channels of one input channel, between Q and DQ."""
    values = {
        "x_scale": np.float32(0.01),
        "x_zero": np.uint8(0),
        "w": np.array(weight, np.int8).reshape(2, 1, 1, 1),
        "w_scale": np.array(weight_scale, np.float32),
        "w_zero": np.zeros(2, np.int8),
        "bias": np.array(bias, np.float32),
        "y_scale": np.float32(0.02),
        "y_zero": np.uint8(128),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_dq"], axis=0),
        helper.make_node("Conv", ["x_dq", "w_dq", "bias"], ["y_f"]),
        helper.make_node("QuantizeLinear", ["y_f", "y_scale", "y_zero"], ["y_q"]),
        helper.make_node("DequantizeLinear", ["y_q", "y_scale", "y_zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 2, 2])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("weight", [[100, 0], [100, 127]])
def test_a_bias_that_would_overflow_int32_beside_its_channel_s_weight_stays_right(
    weight: list[int], tmp_path: Path
) -> None:
    model = one_layer([0.01, 1e-12], weight, [0.1, -1.5])
    assert quantize_biases(model) == 1
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"x": np.full((1, 1, 2, 2), 0.5, np.float32)})
    np.testing.assert_allclose(answer[0, :, 0, 0], [0.5 * 1.0 + 0.1, -1.5], atol=0.011)
    assert operators_that_run(model.SerializeToString(), tmp_path)["QLinearConv"] == 1
    assert "bias" not in {each.name for each in model.graph.initializer}


class Dense(nn.Module):
    """A layer of a DenseNet: batch norm reads what convolutions gave before, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(16), nn.Conv2d(16, 10, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.branch(x)], 1)
        return self.last(self.norm(x).relu()).flatten(1)


@needs_vnni
def test_batch_norm_reads_what_is_joined_and_not_the_same_numbers_quantized_again() -> None:
    """OpenVINO dies of it; tests/quantization/test_conformance.py goes the whole way with densenet121."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = converted_net(Dense().eval())
    (norm,) = (each for each in model.graph.nodes if "batch_norm" in str(each.target))
    assert "dequantize" in str(norm.args[0].target), "so it is in the program"
    written = write(model, images(2), 1)
    nodes = onnx.load_from_string(written.files["onnx"]).graph.node
    (norm,) = (node for node in nodes if node.op_type == "BatchNormalization")
    assert [node.op_type for node in nodes if norm.input[0] in node.output] == ["Concat"]
    with torch.no_grad():
        expected = model(images(8))
    assert float((written.call(images(8)) - expected).abs().max() / expected.abs().max()) < 0.01


def test_a_model_of_floats_is_left_as_it_is(float_model: nn.Module) -> None:
    model = onnx.load_from_string(onnx_bytes(float_model, images(2)))
    assert quantize_biases(model) == 0
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in model.graph.node}


def test_the_onnx_is_made_once_for_all_runtimes_and_anew_for_other_weights() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)).eval()
    first = onnx_bytes(net, images(2))
    assert onnx_bytes(net, images(2)) is first
    net[1].weight.data.mul_(2)
    assert onnx_bytes(net, images(2)) is not first
    assert onnx_bytes(net, images(2)) != first


def test_of_equal_programs_the_onnx_is_made_once_and_is_what_each_would_give(
    program: ExportedProgram, converted: nn.Module
) -> None:
    again = program_of(converted)
    first = onnx_bytes(program, images(2))
    assert onnx_bytes(again, images(2)) is first
    assert onnx_module._export(again, images(2)) == first
    other = copy.deepcopy(converted)
    with torch.no_grad():
        other.state_dict()["_frozen_param0"].add_(1)
    assert onnx_bytes(program_of(other), images(2)) != first


def test_the_onnx_of_a_module_is_forgotten_with_it() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)).eval()
    before = len(onnx_module._kept)
    onnx_bytes(net, images(2))
    key = next(reversed(onnx_module._kept))
    assert key[0] == id(net) and len(onnx_module._kept) <= before + 1
    del net
    gc.collect()
    assert key not in onnx_module._kept
