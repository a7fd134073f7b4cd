"""A backend's check refuses the models that it cannot take, with the place and what to type, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from dist_train.config.stages import RuleConfig
from dist_train.errors import QuantizationError
from dist_train.quantization.pt2e.backend import PT2EBackend
from tests.support.one_net_all_backends import backend
from tests.support.tiny_nets import calibrate

pytestmark = pytest.mark.heavy


def ruled(match: Any, **settings: Any) -> RuleConfig:
    return RuleConfig.model_validate({"match": match, **settings})


class Product(nn.Module):
    """Its one product is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3 * 16 * 16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("model", "rules", "message", "hint"),
    [
        (convolutions(), [ruled("*", skip=True)], "Sequential has nothing that can be quantized", "remove rules"),
        (convolutions(), [ruled({"type": "ReLU"}, activation={"bits": 4})], "ReLU} changes nothing", "match a conv"),
        (Product(), [], "no Conv2d or Linear that is not skipped", "leave `qat` and `convert` out"),
    ],
)
def test_pt2e_finds_before_training_that_nothing_would_be_quantized(
    model: nn.Module, rules: list[RuleConfig], message: str, hint: str, images: Tensor
) -> None:
    with pytest.raises(QuantizationError) as error:
        backend("pt2e").check(model, rules, images)
    assert message in error.value.message
    assert hint in error.value.hint


class Doubled(nn.Module):
    """A convolution with a hook that doubles its output and becomes part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.conv.register_forward_hook(lambda module, inputs, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_what_torchao_raises_names_the_module_the_line_and_what_to_type(images: Tensor) -> None:
    model = nn.Sequential(Doubled(), nn.Flatten(), nn.Linear(588, 5)).eval()
    with pytest.raises(QuantizationError) as error:
        backend("pt2e").check(model, (), images)
    assert "at 0.conv, test_dry_run.py line" in error.value.message
    assert "return self.conv(x): mul is not an aten conv2d operator" in error.value.message
    rule = "'[{match: \"0.conv\", skip: true}]'"
    assert error.value.hint == f"--qat.rules {rule}, or --qat.backend fx"
    with pytest.raises(QuantizationError) as error:  # what it said does not help here
        backend("pt2e").check(model, [ruled("0.conv", skip=True)], images)
    assert error.value.hint == "change what is named, or --qat.backend fx"
    with pytest.raises(QuantizationError, match="0.conv has a hook"):  # converting would lose it
        backend("fx").check(model, (), images)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_pt2e_quantizes_a_convolution_that_pads_with_what_is_there(mode: Any, images: Tensor) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)
    ).eval()
    pt2e = PT2EBackend()
    prepared = pt2e.prepare(model, images)
    names = {name for name, _ in prepared.get_submodule("quantizers").named_children()}
    assert {"0_weight", "0_input", "3_weight"} <= names
    prepared.fake_quantize(False)
    with torch.no_grad():
        torch.testing.assert_close(prepared(images), model(images), rtol=1e-5, atol=1e-6)
        prepared.fake_quantize(True)
        calibrate(prepared, images).observe(False)
        converted = pt2e.convert(prepared)
        torch.testing.assert_close(converted(images), prepared(images), rtol=1e-5, atol=1e-5)
    assert pt2e.serialize(converted, images).data


@pytest.mark.parametrize("name", ["pt2e", "fx"])
def test_a_batch_norm_that_does_not_scale_is_taken(name: str, images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten())
    backend(name).check(model.eval(), (), images)
    prepared = backend(name).prepare(model, images)
    prepared.fake_quantize(False)
    torch.testing.assert_close(prepared(images), model(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("followers", [[nn.ReLU()], [nn.BatchNorm2d(4), nn.ReLU()]])
def test_fx_refuses_parametrized_layers_by_name(followers: list[nn.Module], images: Tensor) -> None:
    model = nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), *followers).eval()
    with pytest.raises(QuantizationError, match=r"^0: its weight is computed by _WeightNorm") as error:
        backend("fx").check(model, (), images)
    assert "--qat.backend pt2e" in error.value.hint
    assert "remove_parametrizations" in error.value.hint
    backend("pt2e").check(model, (), images)


def folded() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(576, 5),
    ).eval()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("pt2e", {"type": "BatchNorm2d"}),
        ("pt2e", "4"),
        ("pt2e", {"type": "ReLU"}),
        ("fx", {"type": "BatchNorm2d"}),
        ("fx", {"type": "ReLU"}),
    ],
)
def test_a_rule_that_skips_what_nothing_quantizes_by_itself_is_refused(name: str, match: Any, images: Tensor) -> None:
    with pytest.raises(QuantizationError, match="changes nothing") as error:
        backend(name).check(folded(), [ruled("3", skip=True), ruled(match, skip=True)], images)
    assert "match the convolution or Linear before it" in error.value.hint


class Gated(nn.Module):
    """A transposed convolution, which neither backend quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.conv, self.relu = nn.ConvTranspose2d(3, 3, 3), nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(self.up(x)))


@pytest.mark.parametrize("name", ["pt2e", "fx"])
def test_a_rule_may_skip_layers_that_are_in_floating_point_anyway_and_parts_of_what_it_matches(
    name: str, images: Tensor
) -> None:
    backend(name).check(Gated().eval(), [ruled("up", skip=True)], images)
    backend(name).check(folded(), [ruled("[012]", skip=True)], images)
