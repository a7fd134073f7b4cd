"""Shapes of model zoos under pt2e: prepared as float, converted as simulated, and a program that others open."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from dist_train.errors import QuantizationError
from dist_train.programs.program import open_program
from dist_train.programs.pt2 import export_program, load_program, program_bytes
from dist_train.quantization.fake_quantize import WeightFakeQuantize
from dist_train.quantization.pt2e import backend, partition_search
from dist_train.quantization.pt2e.backend import PT2EBackend
from dist_train.quantization.pt2e.graph_rewrite import batch_norms
from dist_train.quantization.pt2e.prepared_graph import PreparedGraph
from dist_train.quantization.pt2e.torchao_parts import graph_utils
from tests.support.tiny_nets import calibrate, draw_statistics
from tests.support.zoo_shapes import (
    Attention,
    Reparameterizable,
    Standardized,
    ZeroBesideWrites,
    by_batch_norm,
    by_moments,
    residual_chain,
)

SHAPES: dict[str, Callable[[], nn.Module]] = {
    "block-without-tensors-or-gradients": Attention,
    "sum-from-zero": Reparameterizable,
    "zero-added-to-write-into": ZeroBesideWrites,
    "weight-by-batch-norm": lambda: Standardized(by_batch_norm),
    "weight-by-moments": lambda: Standardized(by_moments),
}


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    copied = copy.deepcopy(model).train()
    copied(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in copied.named_parameters() if parameter.grad is not None}


def prepared_as_float(model: nn.Module, x: Tensor) -> PreparedGraph:
    prepared = PT2EBackend().prepare(model, x).eval()
    prepared.fake_quantize(False)
    with torch.no_grad():
        assert relative(prepared(x), model(x)) < 1e-4
    expected, found = gradients(model, x), gradients(prepared, x)
    largest = max(float(value.abs().max()) for value in expected.values())
    assert expected.keys() == found.keys() >= {"head.weight"}
    assert all((found[name] - value).abs().max() < 1e-4 * largest for name, value in expected.items())
    prepared.fake_quantize(True)
    return prepared


@pytest.mark.heavy
@pytest.mark.parametrize("name", SHAPES)
def test_it_goes_the_whole_way(name: str, images: Tensor) -> None:
    model = draw_statistics(SHAPES[name]()).eval()
    prepared = prepared_as_float(model, images)
    calibrate(prepared, images).observe(False)
    converted = PT2EBackend().convert(prepared)
    with torch.no_grad():
        expected = converted(images)
        assert relative(expected, prepared(images)) < 0.02
    program = PT2EBackend().serialize(converted, images)
    assert relative(open_program(program)(images[:3]), expected[:3]) < 1e-6
    weights = sum(isinstance(module, WeightFakeQuantize) for module in prepared.modules())
    integers = [value for value in load_program(program.data).state_dict.values() if value.dtype == torch.int8]
    assert len(integers) == weights >= 2


@pytest.mark.heavy
def test_a_float_program_holds_no_modes(images: Tensor) -> None:
    model = Attention(nested=True).eval()
    program = load_program(program_bytes(export_program(model, images)))
    with torch.no_grad():
        assert torch.equal(program.module()(images[:5]), model(images[:5]))


@pytest.mark.heavy
def test_standardized_weights_are_not_taken_for_data(images: Tensor) -> None:
    prepared = PT2EBackend().prepare(Standardized(by_batch_norm).eval(), images)
    assert list(prepared.batch_norms) == ["norm"]
    assert len(list(batch_norms(prepared.graph_module().graph))) == 1


class Cast(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(device_type=x.device.type, enabled=False):
            y = self[0](x).float().mean((2, 3))
        return y + self[0](x).float().mean((2, 3))


@pytest.mark.heavy
def test_casts_do_not_keep_a_model_from_training_in_bf16(images: Tensor) -> None:
    prepared = PT2EBackend().prepare(Cast(nn.Conv2d(3, 4, 3)), images)
    calibrate(prepared, images).train()
    with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
        assert prepared(images).dtype is torch.float32


class Autocast(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(device_type=x.device.type, dtype=torch.bfloat16):
            x = self[0](x)
        return x.float().mean((2, 3))


class Branch(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (self[0](x),)).mean((2, 3))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("model", "named", "hint"),
    [(Autocast, "0: torch.autocast", "`precision`"), (Branch, "the model itself: cond", "torch.where")],
)
def test_blocks_that_no_program_may_hold_are_refused_before_training(
    model: type[nn.Module], named: str, hint: str, images: Tensor
) -> None:
    with pytest.raises(QuantizationError, match=f"{named} in forward cannot be quantized") as error:
        PT2EBackend().check(model(nn.Conv2d(3, 4, 3)), (), images)
    assert hint in error.value.hint


def test_set_up_runs_what_it_converted(tiny: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    strip = backend._strip

    def too_much(converted: GraphModule) -> None:
        strip(converted)
        delattr(converted.get_submodule("fc"), "bias")

    monkeypatch.setattr(backend, "_strip", too_much)
    with pytest.raises(QuantizationError, match="no attribute 'bias'"):
        PT2EBackend().check(tiny, (), images)


# ---- the search for patterns

PATTERNS: list[list[Any]] = [
    [nn.Conv2d, nn.BatchNorm2d, operator.add, nn.ReLU],
    [nn.Conv2d, nn.BatchNorm2d],
    [nn.BatchNorm2d, operator.add],
    [nn.ReLU],
]


def names(chains: list[Any]) -> list[list[list[str]]]:
    return [[[node.name for node in partition.nodes] for partition in chain] for chain in chains]


def test_the_search_finds_what_torchao_finds_in_its_order() -> None:
    module = residual_chain(4)
    for pattern in PATTERNS:
        found = names(partition_search.find_sequential_partitions(module, pattern))
        assert found == names(graph_utils.find_sequential_partitions(module, pattern))
        assert found


def test_the_search_ends_in_a_deep_net() -> None:
    assert len(partition_search.find_sequential_partitions(residual_chain(100), PATTERNS[0])) == 100, "of 1e8 tuples"


@pytest.mark.heavy
def test_torchao_s_own_search_places_the_same_fake_quantization(
    tiny: nn.Module, prepared: PreparedGraph, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition_search, "find_sequential_partitions", graph_utils.find_sequential_partitions)
    assert str(PT2EBackend().prepare(tiny, images).graph_module().graph) == str(prepared.graph_module().graph)
