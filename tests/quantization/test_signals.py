"""1-d convolutions and recurrent layers by each backend: what becomes int8, and what is said of the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.config.stages import QATConfig
from dist_train.quantization.int8_share import advise, int8_share
from dist_train.quantization.layer_sqnr import layer_sqnr
from tests.support.one_net_all_backends import backend
from tests.support.signal_nets import Recurrent, SignalNet
from tests.support.tiny_nets import calibrate

pytestmark = pytest.mark.heavy


def test_signals_by_fx_but_for_the_transposed_convolution() -> None:
    torch.manual_seed(0)
    model, x = SignalNet().eval(), torch.randn(32, 3, 32)
    fx = backend("fx")
    fx.check(model, (), x[:2])
    prepared = calibrate(fx.prepare(model, x[:2]), x).eval()
    share = int8_share(model, prepared)
    assert share is not None and list(share.left_float) == ["up.0"], "pt2e takes it: pt2e/test_more_layers.py"
    assert min(layer_sqnr(prepared, fx.convert(prepared), x).values()) > 40


@pytest.mark.slow
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("kind", ["pt2e", "fx"])
def test_a_recurrent_layer_stays_float_and_the_linears_become_int8(kind: str, layer: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model, x = Recurrent(layer).eval(), torch.randn(32, 7, 3)
    ours = backend(kind)
    ours.check(model, (), x[:2])
    prepared = calibrate(ours.prepare(model, x[:2]), x).eval()
    share = int8_share(model, prepared)
    assert share is not None and list(share.left_float) == ["recurrent"] and set(share.int8) == {"hidden", "head"}
    with torch.no_grad():
        expected, results = prepared(x), ours.convert(prepared)(x)
    assert (results - expected).abs().max() < 0.05 * expected.abs().max()
    said = advise(model, x[:2], QATConfig.model_validate({"backend": kind}), share)
    assert f"recurrent: torch computes nn.{layer.__name__} in one operator, without int8 kernels" in said
