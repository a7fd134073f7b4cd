"""The noise of each layer of an integer model is that layer's own, and a wrong scale is found where it is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from dist_train.quantization.layer_sqnr import layer_sqnr, sqnr_as_json, sqnr_table
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.pt2e.backend import PT2EBackend
from dist_train.quantization.pt2e.prepared_graph import PreparedGraph
from tests.support.faulty_backends import scale_of
from tests.support.one_net_all_backends import StubNet, backend
from tests.support.tiny_nets import calibrate, draw_statistics


@pytest.fixture
def graph(prepared: PreparedGraph, images: Tensor) -> tuple[PreparedGraph, nn.Module]:
    calibrate(prepared, images)
    return prepared, PT2EBackend().convert(prepared)


@pytest.fixture(params=["fx", "eager"])
def modules(request: pytest.FixtureRequest, images: Tensor) -> tuple[PreparedModel, nn.Module]:
    made = backend(request.param)
    prepared = calibrate(made.prepare(draw_statistics(StubNet()).eval(), images), images)
    return prepared, made.convert(prepared)


def test_layers_of_a_faithful_conversion_have_no_noise_but_that_of_float32(
    graph: tuple[PreparedGraph, nn.Module], images: Tensor
) -> None:
    noise = layer_sqnr(*graph, images)
    assert noise.keys() == {"conv1", "conv2", "add", "mean", "fc"}
    assert min(noise.values()) > 100


@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc"])
def test_a_wrong_scale_shows_in_its_layer_and_in_no_other(
    layer: str, graph: tuple[PreparedGraph, nn.Module], images: Tensor
) -> None:
    scale_of(graph[1], layer, 3.0)
    first, *others = layer_sqnr(*graph, images).items()
    assert first[0] == layer and first[1] < 20
    assert all(ratio > 100 for _, ratio in others)


def test_the_integer_kernels_of_torch_ao_are_within_a_rounding_and_a_wrong_scale_is_found(
    modules: tuple[PreparedModel, nn.Module], images: Tensor
) -> None:
    before = layer_sqnr(*modules, images)
    assert {"conv1", "conv2", "fc"} <= before.keys() and min(before.values()) > 30
    scale_of(modules[1], "conv2", 1 / 3)
    after = layer_sqnr(*modules, images)
    assert next(iter(after)) == "conv2" and after["conv2"] < 25
    assert {name: ratio for name, ratio in after.items() if name != "conv2"} == {
        name: ratio for name, ratio in before.items() if name != "conv2"
    }


def test_the_ratio_is_that_of_the_powers_in_decibels(graph: tuple[PreparedGraph, nn.Module], images: Tensor) -> None:
    prepared, converted = graph
    with torch.no_grad():  # the head adds a tenth of its fake-quantized output
        scale_of(converted, "fc", 1.1)
        converted.get_parameter("fc.bias").mul_(1.1)
    assert layer_sqnr(prepared, converted, images)["fc"] == pytest.approx(20, abs=1e-3)


def test_a_layer_that_answers_nan_is_the_worst(graph: tuple[PreparedGraph, nn.Module], images: Tensor) -> None:
    scale_of(graph[1], "conv2", math.nan)
    scale_of(graph[1], "conv1", 3.0)
    noise = layer_sqnr(*graph, images)
    assert list(noise)[:2] == ["conv2", "conv1"]
    assert sqnr_table(noise).splitlines()[0] == "  conv2  not finite"


def test_measuring_changes_neither_model(graph: tuple[PreparedGraph, nn.Module], images: Tensor) -> None:
    prepared, converted = graph
    before = copy.deepcopy(prepared.state_dict()), converted(images)
    observed = [module.step_low.clone() for module in prepared.fake_quantizers]
    layer_sqnr(prepared, converted, images)
    assert all(torch.equal(value, before[0][name]) for name, value in prepared.state_dict().items())
    assert torch.equal(converted(images), before[1])
    assert all(
        torch.equal(low, module.step_low) for low, module in zip(observed, prepared.fake_quantizers, strict=True)
    )


def test_the_table_is_as_long_as_asked_and_says_what_is_left_out() -> None:
    layers = {"a": -3.25, "layer1.b": 8.0, "c": math.inf, "d": math.inf}
    assert sqnr_table(layers, 3) == "  a         -3.2 dB\n  layer1.b  8.0 dB\n  c         equal\n  and 1 more"
    assert [sqnr_as_json(ratio) for ratio in (1.5, math.inf, -math.inf, math.nan)] == [
        1.5,
        "equal",
        "no signal",
        "not finite",
    ]
