"""Mixup and cutmix: the same pixels, partners and losses at any world size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_train.config.data import MixConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.augment.mix import Mix, NoMix
from dist_train.data.augment.steps import Augmentation
from dist_train.data.loader import Source, StepBatch, TrainLoader
from dist_train.data.sampler import ElasticDistributedSampler
from dist_train.distributed.world import World
from dist_train.errors import DataError
from dist_train.training.loop import fit
from tests.support.ranks import call
from tests.support.training_loops import flat, make, mlp

SIZE, BATCH = 23, 7
KINDS = [MixConfig(mixup=0.4), MixConfig(cutmix=1.0), MixConfig(mixup=0.3, cutmix=0.7, p=0.8)]


def steps(mix: Mix | NoMix, world_size: int = 1, rank: int = 0, micro: int | None = None) -> list[StepBatch]:
    images = torch.randint(0, 256, (SIZE, 1, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageArrays(images, torch.arange(SIZE))
    augmentation = Augmentation([], seed=0, mean=(0.0,), std=(1.0,))
    sampler = ElasticDistributedSampler(data, world_size, rank, seed=3, global_batch_size=BATCH)
    loader = TrainLoader(Source(data, augmentation, torch.device("cpu"), False, 0, 3), sampler, micro, mix)
    return list(loader.epoch(1, 0, loader.steps_per_epoch))


def rows(batches: list[StepBatch]) -> dict[int, tuple[torch.Tensor, int, int, float]]:
    """Sample -> its mixed pixels, target, partner's target and weight; a row that is not mixed is its own partner."""
    found: dict[int, tuple[torch.Tensor, int, int, float]] = {}
    for batch in batches:
        numbers = iter(batch.ids)
        for micro in batch.micro_batches:
            partners = micro.targets if micro.partner_targets is None else micro.partner_targets
            for row in range(micro.rows):
                found[next(numbers)] = (micro.inputs[row], int(micro.targets[row]), int(partners[row]), micro.weight)
    return found


@pytest.mark.parametrize("settings", KINDS)
def test_each_row_is_mixed_alike_at_any_world_size_and_micro_batch(settings: MixConfig) -> None:
    alone = rows(steps(Mix(settings, seed=5)))
    assert sorted(alone) == list(range(SIZE))
    for world_size, micro in ((2, None), (3, 2), (5, None), (1, 3)):
        for rank in range(world_size):
            for number, (pixels, *rest) in rows(steps(Mix(settings, seed=5), world_size, rank, micro)).items():
                assert torch.equal(pixels, alone[number][0]) and rest == list(alone[number][1:])


def test_mixup_is_the_weighted_sum_with_the_row_before_in_the_global_batch() -> None:
    plain = steps(NoMix())
    mixed = rows(steps(Mix(MixConfig(mixup=1.0), seed=5)))
    pixels = {number: row for number, (row, *_) in rows(plain).items()}
    weights = set()
    for batch in plain:
        for number, partner in zip(batch.ids, [batch.ids[-1], *batch.ids[:-1]], strict=True):
            row, target, partner_target, weight = mixed[number]
            assert (target, partner_target) == (number, partner)
            assert torch.allclose(row, weight * pixels[number] + (1 - weight) * pixels[partner], atol=1e-6)
            weights.add(weight)
    assert len(weights) == len(plain), "each step draws its own"


def test_cutmix_puts_the_partners_box_in_and_weighs_by_the_pixels_that_are_left() -> None:
    plain = {number: row for number, (row, *_) in rows(steps(NoMix())).items()}
    shares = set()
    for number, (row, _, partner, weight) in rows(steps(Mix(MixConfig(cutmix=1.0), seed=6))).items():
        own, others = row == plain[number], row == plain[partner]
        assert bool((own | others).all())
        assert float((~own).float().mean()) <= 1 - weight + 1e-6, "own pixels outside the box"
        inside = round((1 - weight) * row.numel())
        assert int(others.sum()) >= inside
        shares.add(inside)
    assert len(shares) > 1


def test_what_a_step_draws_is_a_function_of_seed_epoch_and_step() -> None:
    settings = MixConfig(mixup=0.5, cutmix=0.5, p=0.7)
    draws = {(epoch, step): Mix(settings, 1).draw(epoch, step) for epoch in range(20) for step in range(20)}
    assert all(Mix(settings, 1).draw(*key) == draw for key, draw in list(draws.items())[:5])
    assert Mix(settings, 2).draw(0, 0) != draws[0, 0] or Mix(settings, 2).draw(0, 1) != draws[0, 1]
    made = [draw for draw in draws.values() if draw is not None]
    assert 0.6 < len(made) / len(draws) < 0.8, "p"
    assert 0.4 < sum(draw.cutmix for draw in made) / len(made) < 0.6, "one of the two"
    assert all(0 <= draw.weight <= 1 for draw in made)
    assert not any(draw.cutmix for draw in (Mix(MixConfig(mixup=1.0), 0).draw(0, n) for n in range(20)) if draw)


@pytest.mark.parametrize(
    ("inputs", "targets"), [(torch.zeros(4, 9), torch.zeros(4)), (torch.zeros(4, 3, 8, 8), torch.zeros(4, 8, 8))]
)
def test_cutmix_of_what_is_no_image_with_one_target_is_refused(inputs: torch.Tensor, targets: torch.Tensor) -> None:
    with pytest.raises(DataError, match="cutmix is for images") as caught:
        Mix(MixConfig(cutmix=1.0), 0)(inputs, inputs, targets, 0, 0)
    assert "--data.mix.cutmix 0" in caught.value.hint
    assert Mix(MixConfig(mixup=1.0), 0)(inputs, inputs, targets, 0, 0) is not None


def _losses(world: World, settings: dict[str, Any], micro: int | None) -> dict[str, Any]:
    model = mlp()
    made = make(world, model, micro=micro, mix=MixConfig(**settings))
    fit(made.run, None)
    return {"losses": made.recorder.of("loss"), "parameters": flat(model)}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"mixup": 0.4, "cutmix": 1.0}])
def test_losses_and_parameters_agree_on_real_ranks(settings: dict[str, Any]) -> None:
    alone = _losses(World(), settings, None)
    unmixed = make(World(), mlp())
    fit(unmixed.run, None)
    assert alone["losses"] != pytest.approx(unmixed.recorder.of("loss"), abs=1e-2), "mixing changes the loss"
    for world_size, micro in ((2, None), (3, 2)):
        for each in call(world_size, "tests.data.augment.test_mix:_losses", settings, micro):
            assert each["losses"] == pytest.approx(alone["losses"], abs=1e-5)
            assert each["parameters"] == pytest.approx(alone["parameters"], abs=1e-5)
