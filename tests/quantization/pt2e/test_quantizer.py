"""Rules under pt2e: each module gets its own integers, and what is converted is what was simulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.config.stages import RuleConfig
from dist_train.errors import QuantizationError
from dist_train.quantization.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize
from dist_train.quantization.pt2e.backend import PT2EBackend
from dist_train.quantization.pt2e.prepared_graph import PreparedGraph
from tests.support.tiny_nets import calibrate


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def grids(prepared: PreparedGraph) -> dict[str, tuple[int, int]]:
    """The integers of each fake-quantize module."""
    return {
        name: (module.quant_min, module.quant_max)
        for name, module in prepared.get_submodule("quantizers").named_children()
        if isinstance(module, (ActivationFakeQuantize, WeightFakeQuantize))
    }


def ruled(match: Any, **settings: Any) -> RuleConfig:
    return RuleConfig.model_validate({"match": match, **settings})


def test_widths_by_rule_convert_to_what_was_simulated(tiny: nn.Module, images: Tensor) -> None:
    rules = [
        ruled("conv2", weight={"bits": 4}, activation={"bits": 5}),
        ruled({"type": "Linear"}, weight={"bits": 3, "scheme": "affine", "granularity": "tensor"}),
        ruled("*", activation={"scheme": "symmetric"}),
    ]
    prepared = PT2EBackend().prepare(tiny, images, rules)
    found = grids(prepared)
    assert (found["conv2_weight"], found["fc_weight"], found["conv1_weight"]) == ((-8, 7), (-4, 3), (-128, 127))
    # The addition reads what conv2 reads, in 8 bits.
    assert (found["conv2_input"], found["conv2_input_1"], found["fc_input"]) == ((0, 255), (0, 31), (0, 255))
    assert prepared.get_submodule("quantizers.conv1_input").qscheme == torch.per_tensor_symmetric
    calibrate(prepared, images).observe(False)
    converted = PT2EBackend().convert(prepared)
    with torch.no_grad():
        assert relative(converted(images), prepared(images)) < 1e-5
        assert relative(prepared(images), tiny(images)) > 0.005, "fewer bits show"
    weights = [value for value in converted.state_dict().values() if value.dtype == torch.int8]
    assert sorted(int(value.abs().max()) for value in weights) == [4, 7, 127]


@pytest.mark.slow
def test_an_output_that_is_read_in_one_width_only_is_rounded_once(images: Tensor) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    ).eval()
    prepared = PT2EBackend().prepare(model, images, [ruled("3", activation={"bits": 4})])
    assert {name: grid for name, grid in grids(prepared).items() if "input" in name} == {
        "0_input": (0, 255),
        "3_input": (0, 15),
        "output_input": (0, 255),
    }


@pytest.mark.slow
def test_a_rule_for_what_is_not_quantized_is_refused(tiny: nn.Module, images: Tensor) -> None:
    with pytest.raises(QuantizationError, match="'dropout' changes nothing"):
        PT2EBackend().prepare(tiny, images, [ruled("dropout", activation={"bits": 4})])
