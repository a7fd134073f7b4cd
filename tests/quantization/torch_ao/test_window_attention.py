"""torchvision's windowed attention in single operations computes the same, and becomes int8 by fx."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from dist_train.quantization.int8_share import int8_share
from dist_train.quantization.layer_sqnr import layer_sqnr
from dist_train.quantization.torch_ao.window_attention import open_windows
from tests.support.one_net_all_backends import backend
from tests.support.tiny_nets import calibrate


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (4, 4), (4, 12), (3, 9)], ids=str)
@pytest.mark.parametrize("shift", [[0, 0], [2, 2], [1, 3]], ids=str)
def test_it_computes_the_same(kind: type[nn.Module], size: tuple[int, int], shift: list[int]) -> None:
    module = kind(16, [4, 4], shift, 2).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    ours = copy.deepcopy(module)
    open_windows(ours)
    assert type(ours) is not type(module) and ours.state_dict().keys() == module.state_dict().keys()
    x = torch.randn(3, *size, 16)
    found, expected = ours(x), module(x)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    for each in (found, expected):
        each.square().sum().backward()
    for (name, one), (_, other) in zip(ours.named_parameters(), module.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_a_swin_becomes_int8(version: int) -> None:
    torch.manual_seed(0)
    more: dict[str, Any] = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    model = SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=5, **more).eval()
    images = torch.randn(32, 3, 28, 28)
    fx = backend("fx")
    fx.check(model, (), images[:2])
    prepared = calibrate(fx.prepare(model, images[:2]), images).eval()
    share = int8_share(model, prepared)
    assert share is not None and all("relative_position" in name or "." in name for name in share.left_float)
    assert share.share > 0.97, share.in_words()  # the tables of positions of a net this small count
    # dB of each layer by itself: over all of them roundings of an untrained net add up.
    assert min(layer_sqnr(prepared, fx.convert(prepared), images).values()) > 40
