"""Models that no backend can take are named at set-up, with what to change in the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.config.stages import RuleConfig
from dist_train.errors import QuantizationError
from tests.support.one_net_all_backends import backend
from tests.support.tiny_nets import calibrate
from tests.support.zoo_shapes import Standardized, by_batch_norm, by_moments


class Net(nn.Module):
    def __init__(self, operation: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.operation = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), operation

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.operation(self, self.conv(x)).mean((2, 3)))
        return found


CAUSES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "doubled in training": (lambda model, x: x * 2 if model.training else x, "a branch on self.training"),
    "noise": (lambda model, x: x + torch.randn_like(x), "random in evaluation mode"),
    "dropout": (lambda model, x: F.dropout(x, training=True), "random in evaluation mode"),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["fx", "pt2e"])
@pytest.mark.parametrize("cause", CAUSES)
def test_what_no_backend_takes_names_the_cause_and_no_other_backend(cause: str, name: str, images: Tensor) -> None:
    operation, message = CAUSES[cause]
    with pytest.raises(QuantizationError, match=message) as error:
        backend(name).check(Net(operation).eval(), (), images)
    assert error.value.hint
    assert "--qat.backend" not in error.value.hint


@pytest.mark.parametrize("name", ["fx", "pt2e"])
def test_noise_in_training_alone_is_taken(name: str, images: Tensor) -> None:
    backend(name).check(Net(lambda model, x: x + torch.randn_like(x) if model.training else x).eval(), (), images)


def by_activations(weight: Tensor, gain: Tensor) -> Tensor:
    """With operations that torch.ao would quantize, were they of data."""
    parts = torch.cat([weight.sigmoid()[:4], weight.relu()[4:]]) + weight
    return parts * F.hardsigmoid(gain * 0.3).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("standardize", [by_batch_norm, by_moments, by_activations])
def test_fx_leaves_alone_what_only_parameters_determine(
    standardize: Callable[[Tensor, Tensor], Tensor], images: Tensor
) -> None:
    model = Standardized(standardize).eval()
    backend("fx").check(model, (), images)
    prepared = calibrate(backend("fx").prepare(model, images), images).eval()
    quantizers = {name for name, _ in prepared.get_submodule("model.quantizers").named_children()}
    assert quantizers == {
        *("conv2d_input", "conv2d_weight", "conv2d_1_input", "conv2d_1_weight"),
        *("norm_input", "mean_input", "head_input"),
    }
    torch.testing.assert_close(backend("fx").convert(prepared)(images), prepared(images), rtol=1e-3, atol=1e-3)


class OwnConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, by_moments(self.weight, self.weight[:, 0, 0, 0]), self.bias)


def test_a_rule_reaches_a_functional_convolution_under_fx(images: Tensor) -> None:
    model = nn.Sequential(OwnConv(3, 4, 3), nn.ReLU(), OwnConv(4, 4, 3), nn.Flatten()).eval()
    rule = RuleConfig.model_validate({"match": "2", "skip": True})
    assert "2.weight" in (backend("fx").prepare(model, images).integer_weights() or ())
    left = backend("fx").prepare(model, images, [rule]).integer_weights() or ()
    assert "0.weight" in left and "2.weight" not in left


class ReadsItsWeight(nn.Module):
    """Makes positions of a layer's dtype and device, as XCiT and EdgeNeXt do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.head.weight
        positions = torch.arange(weight.shape[1], device=weight.device).to(weight.dtype)
        found: Tensor = self.head(self.conv(x).mean((2, 3)) + positions)
        return found


def test_fx_takes_a_forward_that_reads_shape_device_and_dtype_of_a_weight(images: Tensor) -> None:
    model = ReadsItsWeight().eval()
    backend("fx").check(model, (), images)
    prepared = calibrate(backend("fx").prepare(model, images), images).eval()
    torch.testing.assert_close(backend("fx").convert(prepared)(images), prepared(images), rtol=1e-3, atol=1e-3)


def called(name: str) -> nn.Module:
    model = nn.Sequential()
    model.add_module(name, nn.Conv2d(3, 4, 3))
    return model.eval()


@pytest.mark.parametrize("name", ["code", "graph", "quantizers", "batch_norms"])
def test_a_name_that_pt2e_s_graph_has_itself_is_refused_and_fx_takes_it(name: str, images: Tensor) -> None:
    with pytest.raises(QuantizationError, match=f"an attribute named `{name}`") as error:
        backend("pt2e").check(called(name))
    assert "--qat.backend fx" in error.value.hint
    backend("fx").check(called(name), (), images)


@pytest.mark.parametrize("kind", ["pt2e", "fx"])
def test_a_keyword_of_python_is_refused_as_a_name(kind: str) -> None:
    with pytest.raises(QuantizationError, match="a keyword of Python"):
        backend(kind).check(called("class"))
