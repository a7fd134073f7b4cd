"""The gate `gradients`: what a backend loses of backward, of train() and of BatchNorm is seen before it trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train.config.stages import QATConfig
from dist_train.data.arrays import Batch
from dist_train.errors import QuantizationError
from dist_train.quantization.backend import build_backend
from dist_train.quantization.gradients import FLOAT32_BOUND
from dist_train.stages.gradient_gate import gradient_difference
from dist_train.tasks import Classification
from tests.support.norms import FixedNorm, NormAct, PlainNorm, SuperNorm
from tests.support.versions import NEEDS_PT2E

CLASSES = 4
BOUND = QATConfig().gradient_bound
BACKENDS = [pytest.param("pt2e", marks=NEEDS_PT2E), "fx"]
OWN_NORMS: list[Callable[[int], nn.Module]] = [NormAct, SuperNorm, PlainNorm, FixedNorm]
pytestmark = pytest.mark.heavy


def layers(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 6, 3)
    return nn.Sequential(first, norm(4), nn.ReLU(), second, norm(6), nn.ReLU())


class Net(nn.Module):
    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.body, self.head = layers(norm), nn.Linear(6, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).mean((2, 3)))
        return logits


class Frozen(Net):
    """Calls its body without gradients."""

    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().features(x)


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


class Scaled(Net):
    """Halves the gradients of its body."""

    def features(self, x: Tensor) -> Tensor:
        halved: Tensor = _Halved.apply(super().features(x))
        return halved


class Settled(Net):
    """Keeps its batch norms in evaluation mode, as fine-tuned detectors do."""

    def train(self, mode: bool = True) -> Settled:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def measured(backend: str, model: nn.Module) -> tuple[float, list[str], torch.dtype]:
    """Returns what `gradient_difference` does, for a model with settled statistics."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(8, 3, 12, 12, generator=generator)
    batch = Batch(torch.arange(8), images, torch.randint(0, CLASSES, (8,), generator=generator))
    nn.Module.train(model)
    with torch.no_grad():
        model(images)
    model.eval()
    prepared = build_backend(QATConfig(backend=backend)).prepare(model, images[:2])
    prepared.fake_quantize(False)
    prepared.observe(False)
    before = [tensor.clone() for tensor in (*model.state_dict().values(), *prepared.state_dict().values())]
    found = gradient_difference(prepared, model, batch, Classification(CLASSES, {}))
    after = (*model.state_dict().values(), *prepared.state_dict().values())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)), "it changes no model"
    assert not model.training
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_model_that_is_prepared_right_differs_by_rounding(bias: bool, backend: str) -> None:
    model = Net()
    if not bias:  # of a convolution before a batch norm: pt2e writes it as a float32 constant
        model.body[3].register_parameter("bias", None)
    value, lines, dtype = measured(backend, model)
    assert lines == [] and value < (1e-9 if dtype is torch.float64 else 1e-3)
    assert dtype is torch.float64 or (backend == "pt2e" and bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_convolutions_of_one_pixel_in_channels_last_and_scalars_are_paired(backend: str) -> None:
    class OnePixel(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mixed = nn.Conv2d(6, 6, 1, bias=False)
            self.scale = nn.Parameter(torch.tensor(0.7))

        def features(self, x: Tensor) -> Tensor:
            found: Tensor = self.mixed(super().features(x)) * self.scale
            return found

    model = OnePixel()
    assert measured(backend, model.to(memory_format=torch.channels_last))[0] < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameters_stay_frozen_and_dropout_does_not_count(backend: str) -> None:
    model = Net()
    model.head = nn.Sequential(nn.Dropout(0.5), model.head)  # type: ignore[assignment]
    model.body.requires_grad_(False)
    assert measured(backend, model)[0] < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", [Settled, *(partial(Net, norm) for norm in OWN_NORMS)])
def test_batch_norms_of_the_model_s_own_train_as_in_the_float_model(
    model: Callable[[], nn.Module], backend: str
) -> None:
    value, lines, dtype = measured(backend, model())
    assert lines == [] and value < (1e-9 if dtype is torch.float64 else 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_initialised_and_equal_parameters_are_paired(backend: str) -> None:
    class Branch(Net):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.BatchNorm2d(6)  # registered in another order than it is called
            self.first = nn.Conv2d(6, 6, 1, bias=False)
            nn.init.zeros_(self.second.weight)

        def features(self, x: Tensor) -> Tensor:
            x = super().features(x)
            return x + self.second(self.first(x))

    assert measured(backend, Branch())[0] < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("model", "named", "written"),
    [
        (Frozen, "torch.no_grad() in the forward of Frozen", "requires_grad_(False)"),
        (Scaled, "the autograd.Function _Halved", "write _Halved in functions that torch differentiates"),
    ],
)
def test_set_up_refuses_what_would_train_otherwise_and_names_the_cause(
    model: Callable[[], nn.Module], named: str, written: str, backend: str
) -> None:
    with pytest.raises(QuantizationError) as error:
        build_backend(QATConfig(backend=backend)).check(model().eval(), (), torch.zeros(2, 3, 12, 12))
    assert named in error.value.message
    assert written in error.value.hint


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_hint_says_is_taken(backend: str) -> None:
    class Stopped(Net):
        def features(self, x: Tensor) -> Tensor:
            return super().features(x).detach()

    model = Stopped()
    model.body.requires_grad_(False)
    build_backend(QATConfig(backend=backend)).check(model.eval(), (), torch.zeros(2, 3, 12, 12))


def test_a_loose_bound_holds_at_set_up_too() -> None:
    loose = QATConfig(backend="fx", gradient_bound=10.0)
    build_backend(loose).check(Scaled().eval(), (), torch.zeros(2, 3, 12, 12))


@pytest.mark.parametrize(
    ("backend", "model", "named"),
    [
        ("fx", Frozen, "body.0.weight"),
        ("fx", Scaled, "body.0.weight"),
    ],
)
def test_what_a_backend_loses_fails_the_gate_and_is_named(
    backend: str, model: Callable[[], nn.Module], named: str
) -> None:
    value, lines, dtype = measured(backend, model())
    assert value > (BOUND if dtype is torch.float64 else FLOAT32_BOUND) or math.isnan(value)
    assert any(named in line for line in lines), lines
