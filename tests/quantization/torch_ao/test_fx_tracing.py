"""The fx backend takes models as they are written: batch norms of their own, taken names, torch's rarer functions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.config.stages import RuleConfig
from dist_train.errors import QuantizationError
from dist_train.models.batch_norm import batch_moments
from dist_train.quantization.layer_sqnr import layer_sqnr
from dist_train.quantization.prepared import PreparedModel
from tests.support.norms import FixedNorm, NormAct, PlainNorm, SuperNorm, WrittenOutNorm
from tests.support.one_net_all_backends import backend
from tests.support.tiny_nets import calibrate


def net(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), norm, nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def statistics(model: nn.Module) -> tuple[Tensor, Tensor]:
    return model.get_buffer("running_mean"), model.get_buffer("running_var")


@pytest.mark.parametrize("norm", [NormAct, SuperNorm, PlainNorm, FixedNorm])
def test_a_subclass_of_batch_norm_is_folded_and_its_statistics_move_as_the_float_model_s(
    norm: Callable[[int], nn.Module], images: Tensor
) -> None:
    model = net(norm(4))
    prepared = backend("fx").prepare(model.eval(), images)
    assert list(prepared.batch_norms) == ["1"]
    folded = prepared.get_submodule(prepared.batch_norms["1"].rpartition(".")[0])
    assert "Bn" in type(folded).__name__, "it is one module with its convolution"
    prepared.fake_quantize(False)
    model.train()(images)
    prepared.train()(images)
    for here, expected in zip(statistics(folded.bn), statistics(model[1]), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(here, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(prepared.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [NormAct, SuperNorm])
def test_it_becomes_integers(norm: Callable[[int], nn.Module], images: Tensor) -> None:
    prepared = calibrate(backend("fx").prepare(net(norm(4)).eval(), images), images).eval()
    converted = backend("fx").convert(prepared)
    torch.testing.assert_close(converted(images), prepared(images), rtol=1e-4, atol=1e-5)
    assert prepared.integer_weights() == ["0.weight", "2.weight"]


def test_a_rule_reaches_it_by_name(images: Tensor) -> None:
    rules = [RuleConfig.model_validate({"match": match, "skip": True}) for match in ("0", "1")]
    prepared = backend("fx").prepare(net(NormAct(4)).eval(), images, rules)
    assert prepared.integer_weights() == ["2.weight"]


def test_a_batch_norm_that_is_written_out_is_refused_by_name(images: Tensor) -> None:
    with pytest.raises(QuantizationError, match=r"^1 is a WrittenOutNorm, a subclass of BatchNorm") as error:
        backend("fx").prepare(net(WrittenOutNorm(4)).eval(), images)
    assert "F.batch_norm" in error.value.hint


class Settled(nn.Sequential):
    """Keeps its first batch norm in evaluation mode."""

    def train(self, mode: bool = True) -> Settled:
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("name", ["fx", "pt2e"])
def test_what_the_model_s_own_train_freezes_stays_frozen_and_the_rest_moves(name: str, images: Tensor) -> None:
    model = Settled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Flatten())
    prepared = backend(name).prepare(model.eval(), images)
    for each in (prepared, copy.deepcopy(prepared)):
        frozen, moving = (each.get_submodule(each.batch_norms[norm]) for norm in ("1", "3"))
        before = [tensor.clone() for tensor in (*statistics(frozen), *statistics(moving))]
        each.train()(images)
        with each.batch_moments():
            each(images)
        after = [*statistics(frozen), *statistics(moving)]
        assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, True, False, False]
    with batch_moments(model):
        model(images)
    assert model[1].running_mean.abs().max() == 0 < model[3].running_mean.abs().max()  # type: ignore[operator]


class Named(nn.Module):
    """Has a convolution, a buffer and a parameter of the given names."""

    def __init__(self, module: str, buffer: str, parameter: str) -> None:
        super().__init__()
        self.names = module, buffer, parameter
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.add_module(module, nn.Conv2d(4, 4, 1))
        self.register_buffer(buffer, torch.rand(4, 1, 1))
        self.register_parameter(parameter, nn.Parameter(torch.rand(4, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        module, buffer, parameter = (getattr(self, name) for name in self.names)
        found: Tensor = module(self.norm(self.conv(x))) * buffer + parameter
        return found.mean((2, 3))


@pytest.mark.parametrize(
    "names", [("code", "graph", "meta"), ("graph", "meta", "_code"), ("print_readable", "code", "quantizers")]
)
def test_names_that_torch_needs_itself_are_the_model_s_all_the_same(
    names: tuple[str, str, str], images: Tensor
) -> None:
    model = Named(*names).eval()
    rules = [RuleConfig.model_validate({"match": names[0], "weight": {"granularity": "tensor"}})]
    backend("fx").check(model, rules, images)
    prepared = calibrate(backend("fx").prepare(model, images, rules), images).eval()
    assert f"{names[0]}.weight" in prepared.integer_weights()
    scales = {len(module.scale(weight).flatten()) for module, weight in _weights(prepared)}
    assert scales == {1, 4}, "the rule reached it"
    converted = backend("fx").convert(prepared)
    torch.testing.assert_close(converted(images), prepared(images), rtol=1e-4, atol=1e-5)


def _weights(prepared: PreparedModel) -> list[tuple[nn.Module, Tensor]]:
    return [
        (module.weight_fake_quant, module.weight)  # type: ignore[misc]
        for module in prepared.modules()
        if hasattr(module, "weight_fake_quant")
    ]


class Written(nn.Module):
    """An operation on two convolutions' outputs [B, 4, 7, 7]."""

    def __init__(self, operation: Callable[[Written, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.operation = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(3, 4, 3, 2), operation
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.up = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.operation(self, self.left(x), self.right(x))).flatten(1)
        return found


OPERATIONS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "add_alpha": lambda model, x, y: torch.add(x, y, alpha=2),
    "add_method_alpha": lambda model, x, y: x.add(y, alpha=3),
    "conv2d": lambda model, x, y: F.conv2d(x + y, model.weight),
    "conv2d_stride": lambda model, x, y: torch.conv2d(x + y, model.weight, stride=2),
    "transposed_batch_norm": lambda model, x, y: model.up(x + y),
    "transformer_layer": lambda model, x, y: model.layer(x.flatten(2).transpose(1, 2)).transpose(1, 2)[..., None],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_rarer_functions_are_computed_as_written_and_become_integers(name: str, images: Tensor) -> None:
    model = Written(OPERATIONS[name]).eval()
    backend("fx").check(model, (), images)
    prepared = backend("fx").prepare(model, images)
    prepared.fake_quantize(False)
    prepared.observe(False)
    torch.testing.assert_close(prepared(images), model(images), rtol=1e-4, atol=1e-5)
    prepared.fake_quantize(True)
    prepared.observe(True)
    calibrate(prepared, images).eval()
    converted = backend("fx").convert(prepared)
    if name == "transformer_layer":  # its normalizations, of 4 values each, multiply single roundings of sums
        assert min(layer_sqnr(prepared, converted, images).values()) > 45
    else:
        torch.testing.assert_close(converted(images), prepared(images), rtol=1e-3, atol=1e-4)


class Sized(nn.Module):
    """Computes a "same" padding and attention from its inputs' sizes, and numbers of a weight's dtype and device.

    A batch norm of its own comes before the sizes are read.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 2), NormAct(4)
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows, columns = (max((math.ceil(size / 2) - 1) * 2 + 3 - size, 0) for size in (height, width))
        if rows > 0 or columns > 0:
            x = F.pad(x, [0, columns, 0, rows])
        x = self.norm(self.conv(x))
        batch, channels, height, width = x.shape
        assert x.dim() == len(x.size()) == 4 and channels == 4
        q, k, v = self.qkv(x.flatten(2).mT).reshape(batch, height * width, 3, 4).unbind(2)
        x = (q @ k.mT / channels**0.5).softmax(-1) @ v
        positions = torch.arange(x.shape[1], dtype=self.head.weight.dtype, device=self.head.weight.device)
        found: Tensor = self.head((x + 0.01 * positions[:, None]).to(x.device).mean(1))
        return found


def test_sizes_are_numbers_where_a_model_branches_on_them_and_any_batch_is_taken(images: Tensor) -> None:
    model = Sized().eval()
    backend("fx").check(model, (), images[:2])
    prepared = backend("fx").prepare(model, images[:2])
    prepared.fake_quantize(False)
    prepared.observe(False)
    for rows in (1, 2, 3):
        torch.testing.assert_close(prepared(images[:rows]), model(images[:rows]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("condition", [lambda x: x.shape[0] > 1, lambda x: x.sum() > 0, lambda x: int(x.argmax()) > 3])
def test_what_depends_on_the_batch_or_on_the_data_is_no_number(
    condition: Callable[[Tensor], bool], images: Tensor
) -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x.relu() if condition(x) else x

    with pytest.raises(QuantizationError, match="torch.fx cannot trace"):
        backend("fx").check(Branch().eval(), (), images)


def _hooked(kind: str) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    if kind == "forward":
        model[3].register_forward_hook(lambda _module, _inputs, outputs: outputs * 0.1)
    elif kind == "before":
        model[0].register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 3,))
    elif kind == "backward":
        model[3].register_full_backward_hook(lambda *_: None)
    else:
        model[0] = nn.utils.weight_norm(model[0])
    return model


@pytest.mark.parametrize(
    ("kind", "layer", "word"),
    [
        ("forward", "3", "has a hook"),
        ("before", "0", "has a hook"),
        ("backward", "3", "has a hook"),
        ("norm", "0", "computed by WeightNorm"),
    ],
)
def test_a_layer_that_would_lose_its_hook_is_refused_by_name(kind: str, layer: str, word: str) -> None:
    with pytest.raises(QuantizationError, match=f"^{layer}.*{word}"):
        backend("fx").check(_hooked(kind), (), torch.zeros(2, 3, 8, 8))
