"""Statistics of an averaged model, estimated anew: those of its own activations, whichever rank saw which batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from dist_train.config.stages import QATConfig
from dist_train.data.arrays import Batch, ImageArrays
from dist_train.data.augment.steps import Augmentation
from dist_train.data.loader import EstimationLoader, Source
from dist_train.distributed.world import World
from dist_train.errors import QuantizationError
from dist_train.models.batch_norm import running_statistics
from dist_train.quantization.backend import build_backend
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from dist_train.training.recalibration import estimate_moments, estimate_ranges
from tests.support.one_net_all_backends import StubNet
from tests.support.tiny_nets import calibrate


def batches(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for size in sizes:
        ids = torch.arange(size)
        made.append(Batch(ids, torch.rand(size, 3, 16, 16, generator=generator), ids))
    return made


def moments(model: nn.Module) -> list[list[float]]:
    return [buffer.tolist() for buffer in running_statistics(model)]


def test_of_a_float_model_they_are_those_of_torchs_update_bn_and_dropout_is_off(tiny: nn.Module) -> None:
    given, expected = batches(6, 6, 6), copy.deepcopy(tiny)
    expected.dropout = nn.Identity()
    update_bn([batch.inputs for batch in given], expected.train())
    estimate_moments(tiny, given, World())
    for found, wanted in zip(running_statistics(tiny), running_statistics(expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not tiny.training


def test_batches_count_by_their_rows_and_one_of_a_single_row_not_at_all(tiny: nn.Module) -> None:
    first, second, single = batches(6, 2, 1)
    parts = []
    for batch in (first, second):
        alone = copy.deepcopy(tiny)
        estimate_moments(alone, [batch, single], World())
        parts.append(running_statistics(alone))
    before = moments(tiny)
    estimate_moments(tiny, [single], World())
    assert moments(tiny) == before
    estimate_moments(tiny, [first, second], World())
    for found, left, right in zip(running_statistics(tiny), *parts, strict=True):
        torch.testing.assert_close(found, 0.75 * left + 0.25 * right)
    again = copy.deepcopy(tiny)
    estimate_moments(again, [second, first], World())
    for found, wanted in zip(running_statistics(again), running_statistics(tiny), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["pt2e", "fx"])
def test_a_prepared_model_has_the_float_models_without_fake_quantization_and_its_own_with_it(
    backend: str, tiny: nn.Module, prepared: PreparedModel, images: Tensor
) -> None:
    if backend == "fx":
        prepared = build_backend(QATConfig(backend="fx")).prepare(tiny, images)
    given = batches(6, 5)
    calibrate(prepared, images)
    ranges, quantized = Ranges(prepared).digest(), copy.deepcopy(prepared)
    with prepared.observing(True):
        estimate_moments(quantized, given, World())
        prepared.fake_quantize(False)
        estimate_moments(prepared, given, World())
        estimate_moments(tiny, given, World())
    for name, own in prepared.batch_norms.items():
        for kind in ("running_mean", "running_var"):
            expected, found = tiny.get_buffer(f"{name}.{kind}"), prepared.get_buffer(f"{own}.{kind}")
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=f"{name}.{kind}")
            other = quantized.get_buffer(f"{own}.{kind}")
            assert not torch.equal(other, found)
            torch.testing.assert_close(other, found, rtol=0.3, atol=0.05, msg=f"{name}.{kind}")
    assert Ranges(prepared).digest() == ranges and torch.isinf(Ranges(prepared).observed()).all(), "observes nothing"
    assert not prepared.training and all(each.observing for each in prepared.fake_quantizers)


def test_ranges_are_the_extremes_of_all_batches_in_evaluation_mode(prepared: PreparedModel, images: Tensor) -> None:
    given = batches(4, 4, 1)
    calibrate(prepared, images)
    first = prepared.get_submodule("quantizers.conv1_input")
    statistics, before = moments(prepared), Ranges(prepared).digest()
    estimate_ranges(prepared.train(), given, World())
    pixels = torch.cat([batch.inputs for batch in given])
    assert (float(first.low), float(first.high)) == (float(pixels.min()), float(pixels.max()))
    assert torch.isinf(Ranges(prepared).observed()).all() and Ranges(prepared).digest() != before
    assert moments(prepared) == statistics


@pytest.mark.parametrize(("size", "samples", "batch"), [(50, 30, 8), (50, 1000, 8), (7, 7, 3), (5, 5, 1), (3, 2, 2)])
def test_batches_to_estimate_from_are_the_same_at_any_world_size(size: int, samples: int, batch: int) -> None:
    pixels = torch.arange(size, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    source = Source(
        ImageArrays(pixels, torch.arange(size)),
        Augmentation([], seed=0, mean=(0.5,), std=(0.25,)),
        torch.device("cpu"),
        False,
        0,
        0,
    )

    def of(world_size: int, seed: int = 1) -> list[list[int]]:
        by_rank = [list(EstimationLoader(source, samples, batch, seed, world_size, rank)) for rank in range(world_size)]
        count = sum(map(len, by_rank))
        return [by_rank[number % world_size][number // world_size].ids.tolist() for number in range(count)]

    alone = of(1)
    assert all(of(world_size) == alone for world_size in (2, 3, 5))
    taken = [number for each in alone for number in each]
    assert len(taken) == len(set(taken)) == min(samples, size)
    assert min(map(len, alone)) >= 2 and max(map(len, alone)) <= max(batch, 3)
    assert size < 50 or of(1, seed=2) != alone, "drawn by the seed, not the first ones"


@pytest.mark.parametrize("backend", ["pt2e", "fx", "eager"])
def test_dropout_is_on_in_training_where_it_is_kept_also_with_frozen_statistics(
    backend: str, tiny: nn.Module, prepared: PreparedModel, images: Tensor
) -> None:
    if backend != "pt2e":
        net = StubNet() if backend == "eager" else tiny
        prepared = build_backend(QATConfig(backend=backend)).prepare(net, images)
    calibrate(prepared, images).observe(False)
    expected = prepared.eval()(images)

    def at(seed: int) -> Tensor:
        torch.manual_seed(seed)
        outputs: Tensor = copy.deepcopy(prepared)(images)  # as a forward moves the statistics
        return outputs

    prepared.train()
    assert torch.equal(at(0), at(1)), "off unless asked"
    prepared.keep_dropout()
    for _ in range(2):
        assert not torch.equal(at(0), at(1)) and torch.equal(at(0), at(0))
        prepared.freeze_batch_norm()
    assert torch.equal(prepared.eval()(images), expected)
    with prepared.batch_moments():
        assert torch.equal(at(0), at(1))


class OwnForward(StubNet):
    """Drops out by a function, and inside a module of torch's whose forward does."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(8, 8, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(self.quant(x))))
        x = nn.functional.dropout(self.dequant(x), 0.5, self.training)
        return self.recurrent(x.mean(3).transpose(1, 2))[0].mean(1)

    def fuse_model(self, is_qat: bool) -> None:
        assert is_qat


def test_under_eager_dropout_in_a_forward_of_ones_own_is_off_too_unless_it_is_kept(images: Tensor) -> None:
    prepared = build_backend(QATConfig(backend="eager")).prepare(OwnForward(), images)
    calibrate(prepared, images).observe(False)
    norm = prepared.model.get_submodule("bn1")
    before = moments(prepared)
    first, second = prepared.train()(images), prepared(images)
    assert torch.equal(first, second) and norm.training and moments(prepared) != before, (
        "batch norms alone are in training"
    )
    prepared.keep_dropout()
    assert not torch.equal(prepared(images), prepared(images))


def test_functional_dropout_that_fx_has_made_a_constant_cannot_be_kept(images: Tensor) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.conv(x), 0.5, self.training)

    prepared = build_backend(QATConfig(backend="fx")).prepare(Functional(), images)
    with pytest.raises(QuantizationError, match=r"dropout: the fx backend traced.*\n.*nn.Dropout.*--qat.backend pt2e"):
        prepared.keep_dropout()
