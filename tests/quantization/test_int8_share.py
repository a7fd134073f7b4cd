"""The int8 share counts the weights that the converted model has as integers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from dist_train.config.stages import QATConfig
from dist_train.quantization.backend import build_backend
from dist_train.quantization.int8_share import Int8Share, int8_share
from dist_train.quantization.layer_sqnr import layer_sqnr
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from dist_train.quantization.torch_ao.integer_model import IntegerModel
from tests.support.one_net_all_backends import StubNet


class Mixed(nn.Module):
    """Has folded, plain and transposed convolutions, Linears and one as a function, attention and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.plain, self.up = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 8, 4, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, add_zero_attn=True, batch_first=True)
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.first, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.plain(torch.relu(self.bn(self.conv(x)))))
        x = x.flatten(2).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0].mean(1)
        return self.tied(torch.relu(self.first(nn.functional.linear(x, self.matrix))))


def integers(converted: nn.Module) -> Iterator[Tensor]:
    """The integer weights that a converted model holds."""
    if isinstance(converted, IntegerModel):
        for module in converted.model.modules():
            weight = getattr(module, "weight", None)
            if callable(weight):
                yield weight()
            elif isinstance(weight, Tensor):  # of a head, whose results stay floating-point
                yield weight
        for value in vars(converted.model).values():
            if isinstance(value, torch.ScriptObject):  # of a function's weight
                yield value.unpack()[0]
        return
    for value in converted.state_dict().values():
        if value.dtype is torch.int8 and value.dim() > 1:
            yield value


def counted(backend: str, model: nn.Module, size: int = 8) -> tuple[Int8Share, int]:
    """The count, and the elements of the converted model's integer weights that are quantized."""
    torch.manual_seed(0)
    ours, images = build_backend(QATConfig(backend=backend)), torch.rand(4, 3, size, size)
    prepared = ours.prepare(model.eval(), images)
    with torch.no_grad():
        prepared(images)
    ranges = Ranges(prepared)
    ranges.update(ranges.observed(), 1.0)
    found = int8_share(model, prepared)
    assert found is not None
    weights = [each for each in integers(ours.convert(prepared)) if each.is_quantized or each.dtype is torch.int8]
    return found, sum(each.numel() for each in weights)


@pytest.mark.parametrize("backend", ["pt2e", "fx", "eager"])
def test_a_net_of_convolutions_is_int8_throughout(backend: str) -> None:
    found, converted = counted(backend, StubNet())
    assert found.share == 1.0 and not found.left_float
    assert found.int8 == {"conv1": 216, "conv2": 576, "fc": 40} and converted == 832
    assert found.in_words() == "100 % of the weights are int8"


@pytest.mark.parametrize("backend", ["pt2e", "fx"])
def test_what_stays_in_floating_point_is_named_the_largest_first(backend: str) -> None:
    model = Mixed()
    found, converted = counted(backend, model)
    assert list(found.left_float.values()) == sorted(found.left_float.values(), reverse=True)
    assert next(iter(found.left_float)) == "up" and found.left_float["up"] == 8 * 4 * 4 * 4
    assert found.left_float["attention"] == 3 * 8 * 8
    assert {"conv", "plain", "first"} <= found.int8.keys()
    assert "tied" not in {**found.int8, **found.left_float}, "tied weights are counted once"
    parameters = [each for each in model.parameters() if each.dim() > 1]
    whole = sum(each.numel() for each in parameters)
    assert sum(found.int8.values()) + sum(found.left_float.values()) == whole
    # fx converts a tied weight for each of its two layers.
    assert converted - sum(found.int8.values()) == {"pt2e": 0, "fx": 64}[backend]
    assert found.share == sum(found.int8.values()) / whole < 0.9
    assert found.in_words().startswith(
        f"{int(found.share * 1000) / 10:g} % of the weights are int8; float: up (512), attention (192)"
    )


def test_a_share_is_rounded_down_so_that_100_means_all() -> None:
    found = Int8Share({"a": 99_999}, {"b": 1})
    assert found.in_words() == "99.9 % of the weights are int8; float: b (1)"
    assert found.as_json()["float_modules"] == {"b": 1}


class Foreign(PreparedModel):
    """The least that a third party's backend must give."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.batch_norms = model, {}

    @property
    def fixed_fake_quantizers(self) -> list[nn.Module]:
        return []

    def literals(self) -> Iterator[tuple[str, float]]:
        return iter(())

    def keep_dropout(self) -> None:
        return

    def batch_moments(self) -> AbstractContextManager[None]:
        return nullcontext()


def test_a_backend_that_tells_nothing_of_its_layers_has_no_share_and_no_ratios() -> None:
    model = StubNet()
    assert int8_share(model, Foreign(model)) is None
    assert layer_sqnr(Foreign(model), model, torch.rand(2, 3, 8, 8)) == {}
