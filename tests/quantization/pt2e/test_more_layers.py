"""1-d and transposed convolutions become int8 by pt2e, with a scale for each output channel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dist_train.config.stages import RuleConfig
from dist_train.programs.program import open_program
from dist_train.quantization.fake_quantize import TransposedWeightFakeQuantize
from dist_train.quantization.int8_share import int8_share
from dist_train.quantization.pt2e.backend import PT2EBackend
from dist_train.quantization.pt2e.prepared_graph import PreparedGraph
from tests.support.signal_nets import SignalNet, UNet
from tests.support.tiny_nets import calibrate, draw_statistics

NETS = {"signal": (SignalNet, (3, 32)), "unet": (lambda: UNet(2, 3), (3, 16, 16))}


def prepared_net(name: str, *rules: object) -> tuple[nn.Module, Tensor, PreparedGraph]:
    build, shape = NETS[name]
    torch.manual_seed(0)
    model, x = draw_statistics(build()).eval(), torch.randn(16, *shape)
    return model, x, PT2EBackend().prepare(model, x[:2], [RuleConfig.model_validate(rule) for rule in rules])


def test_a_transposed_weight_has_a_scale_for_each_output_channel() -> None:
    weight = torch.tensor([1.0, 8.0, 64.0]).view(1, 3, 1, 1) * torch.rand(5, 3, 2, 2).clamp(min=0.1)
    quantizer = TransposedWeightFakeQuantize()
    scale, _ = quantizer.parameters_of(weight)
    assert scale.shape == (1, 3, 1, 1)
    torch.testing.assert_close(scale.flatten(), weight.amax((0, 2, 3)) / 127)
    assert bool(((quantizer(weight) - weight).abs() <= scale / 2 + 1e-6).all())
    quantizer.settle(weight)
    assert quantizer.calculate_qparams()[0].shape == (3,)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_it_goes_the_whole_way(name: str) -> None:
    model, x, prepared = prepared_net(name)
    PT2EBackend().check(model, (), x[:2])
    prepared.fake_quantize(False)
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), model(x), atol=1e-4, rtol=1e-4)
    prepared.fake_quantize(True)
    calibrate(prepared, x).observe(False)
    share = int8_share(model, prepared)
    assert share is not None and share.share == 1.0, share.in_words()
    with torch.no_grad():
        expected, converted = prepared(x), PT2EBackend().convert(prepared)
        results = converted(x)
    assert (results - expected).abs().max() < 0.02 * expected.abs().max()
    program = open_program(PT2EBackend().serialize(converted, x[:2]))
    torch.testing.assert_close(program(x[:3]), results[:3], atol=1e-5, rtol=1e-5)


@pytest.mark.heavy
def test_rules_hold_for_them() -> None:
    tensor = {"match": "up2", "weight": {"granularity": "tensor"}}
    model, x, prepared = prepared_net("unet", {"match": "up1.0", "skip": True}, tensor)
    share = int8_share(model, prepared)
    assert share is not None and list(share.left_float) == ["up1.0"]
    quantizers = [each for each in prepared.modules() if isinstance(each, TransposedWeightFakeQuantize)]
    assert [each.per_tensor for each in quantizers] == [True]
    converted = PT2EBackend().convert(calibrate(prepared, x))
    axes = [
        node.args[3]
        for node in converted.graph.nodes
        if "dequantize_per_channel" in str(node.target) and node.all_input_nodes
    ]
    assert axes and set(axes) == {0}


@pytest.mark.heavy
def test_groups_of_a_transposed_convolution_stay_in_floating_point() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2, groups=2)).eval()
    x = torch.randn(2, 3, 4, 4)
    share = int8_share(model, PT2EBackend().prepare(model, x))
    assert share is not None and list(share.left_float) == ["1"]
