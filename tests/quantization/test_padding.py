"""Paddings by name are quantized as the numbers that they stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.errors import QuantizationError
from dist_train.quantization.pt2e.backend import PT2EBackend
from dist_train.quantization.pt2e.graph_rewrite import folded_batch_norms
from tests.support.conformance_nets import same_padding
from tests.support.one_net_all_backends import backend
from tests.support.tiny_nets import calibrate


@pytest.mark.parametrize("name", ["pt2e", "fx"])
def test_every_kind_of_named_padding_is_kept_and_converts(name: str, images: Tensor) -> None:
    model = same_padding(5, 3).eval()
    prepared = backend(name).prepare(model, images)
    prepared.fake_quantize(False)
    with torch.no_grad():
        torch.testing.assert_close(prepared(images), model(images), rtol=1e-5, atol=1e-6)  # folding rounds
        prepared.fake_quantize(True)
        calibrate(prepared, images).observe(False)
        converted = backend(name).convert(prepared)
        torch.testing.assert_close(converted(images), prepared(images), rtol=0.02, atol=1e-3)
    assert model[0].padding == "same", "the float model is left alone"


def test_a_named_padding_does_not_keep_a_batch_norm_from_being_folded(images: Tensor) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 2, padding="same"), nn.BatchNorm2d(4)
    )
    prepared = PT2EBackend().prepare(model.eval(), images)
    assert [folded.quantized for folded in folded_batch_norms(prepared.blueprint.graph)] == [True, True]


def test_fx_pads_with_what_the_convolution_pads_with(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2, padding="same", padding_mode="reflect")).eval()
    prepared = backend("fx").prepare(model, images)
    prepared.fake_quantize(False)
    assert torch.equal(prepared(images), model(images))


def test_fx_refuses_a_function_with_a_named_padding(images: Tensor) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, padding="same")

    with pytest.raises(QuantizationError, match="padding by name") as error:
        backend("fx").check(Net(), (), torch.zeros(2, 3, 8, 8))  # before anybody trains it
    assert "--qat.backend pt2e" in error.value.hint
    prepared = backend("pt2e").prepare(Net().eval(), images)
    assert len(prepared.fake_quantizers) == 1
