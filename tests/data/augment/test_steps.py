"""Augmentation is a function of (seed, epoch, sample id), and does to pixels what it says."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms.v2 import functional as reference

from dist_train.config.data import AugmentConfig, ColorJitter, RandomCrop, RandomErasing, RandomHorizontalFlip
from dist_train.data.augment.steps import STEPS, Augmentation, draw_keys
from dist_train.data.augment.steps import uniform as uniform_of_keys

JITTER = ColorJitter(brightness=0.4, contrast=0.5, saturation=0.6)
ALL: list[Any] = [RandomCrop(padding=3), RandomHorizontalFlip(), JITTER, RandomErasing(p=0.7)]


def images_of(batch: int, channels: int = 3, height: int = 12, width: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def plain(steps: Sequence[AugmentConfig], channels: int = 3, seed: int = 0) -> Augmentation:
    """Normalization by mean 0 and std 1: outputs are pixels / 255."""
    return Augmentation(steps, seed=seed, mean=[0.0] * channels, std=[1.0] * channels)


def normalized(steps: Sequence[AugmentConfig], channels: int = 3, seed: int = 0) -> Augmentation:
    return Augmentation(steps, seed=seed, mean=[0.45, 0.4, 0.35][:channels], std=[0.2, 0.3, 0.25][:channels])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sample_gets_the_same_pixels_alone_and_in_any_batch_and_order(channels: int, threads: int) -> None:
    images = images_of(301, channels, 23, 21)  # odd sizes: vectorised kernels have an end that is handled apart
    ids = torch.arange(301) * 7919 + 3
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        augment = normalized(ALL, channels)
        whole = augment(images, ids, epoch=4)
        order = torch.randperm(301, generator=torch.Generator().manual_seed(0))
        assert torch.equal(augment(images[order], ids[order], epoch=4), whole[order])
        for size in (1, 2, 37, 150):
            parts = [augment(i, n, epoch=4) for i, n in zip(images.split(size), ids.split(size), strict=True)]
            assert torch.equal(torch.cat(parts), whole)
        torch.set_num_threads(1)
        assert torch.equal(augment(images, ids, epoch=4), whole)
    finally:
        torch.set_num_threads(before)


def test_contrast_of_large_images_does_not_depend_on_the_batch() -> None:
    """A float mean does: torch sums a lone large image in parallel parts, and one of many as a whole."""
    images, ids = images_of(24, 1, 224, 224), torch.arange(24)
    # Brightness first: sums of whole pixel values are exact even as floats.
    augment = normalized([ColorJitter(brightness=0.3, contrast=0.5)], channels=1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pixels = images.float() * 1.2345
        alone_means = torch.cat([image.mean((1, 2, 3)) for image in pixels.split(1)])
        if torch.equal(pixels.mean((1, 2, 3)), alone_means):
            pytest.skip("only where float means differ; they happen to agree here, so that nothing would be shown")
        whole = augment(images, ids, epoch=0)
        alone = [augment(i, n, epoch=0) for i, n in zip(images.split(1), ids.split(1), strict=True)]
        assert torch.equal(torch.cat(alone), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("step", ALL, ids=lambda step: step.name)
def test_epochs_seeds_and_ids_change_what_happens(step: AugmentConfig) -> None:
    images = images_of(1).expand(64, -1, -1, -1)
    ids = torch.arange(64)
    first = plain([step])(images, ids, epoch=0)
    assert torch.equal(plain([step])(images, ids, epoch=0), first)
    assert not torch.equal(plain([step])(images, ids, epoch=1), first)
    assert not torch.equal(plain([step], seed=1)(images, ids, epoch=0), first)
    assert not torch.equal(plain([step])(images, ids + 64, epoch=0), first)
    assert len(first.unique(dim=0)) > 1


def uniform(ids: torch.Tensor, seed: int, epoch: int, salt: str) -> torch.Tensor:
    return uniform_of_keys(ids, draw_keys(seed, epoch, [salt]))[0]


def test_it_leaves_the_global_generator_and_its_input_alone() -> None:
    images, state = images_of(8), torch.get_rng_state()
    kept = images.clone()
    result = normalized(ALL)(images, torch.arange(8), epoch=0)
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.dtype == torch.float32 and result.shape == images.shape


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    ids = torch.arange(40_000)
    draws = [
        uniform(ids, seed, epoch, salt) for seed, epoch, salt in [(0, 0, "a"), (0, 0, "b"), (0, 1, "a"), (1, 0, "a")]
    ]
    for index, draw in enumerate(draws):
        assert draw.dtype == torch.float32 and float(draw.min()) >= 0 and float(draw.max()) < 1
        assert stats.kstest(draw.numpy(), "uniform").pvalue > 1e-3
        for other in (*draws[:index], draw.roll(1), draw.roll(17)):
            cells = np.histogram2d(draw, other, bins=16, range=[[0, 1], [0, 1]])[0]
            assert stats.chisquare(cells.ravel()).pvalue > 1e-3
        assert len(draw.unique()) > 39_900
    linear = (ids % 1000) / 1000
    assert stats.chisquare(np.histogram2d(linear, linear.roll(1), bins=16)[0].ravel()).pvalue < 1e-3, (
        "the test can fail"
    )


def test_uniform_numbers_are_the_same_in_every_version() -> None:
    """A change of these numbers makes runs irreproducible and resumed ones wrong."""
    ids = torch.tensor([0, 1, 2**40, -1])
    assert (uniform(ids, 3, 1, "salt").double() * 2**24).tolist() == [2683128.0, 10268914.0, 11014126.0, 14745821.0]


@pytest.mark.parametrize(("channels", "padding"), [(1, 1), (3, 4), (2, 15)])
def test_crops_are_those_of_a_loop_over_samples(channels: int, padding: int) -> None:
    images, ids = images_of(60, channels), torch.arange(60) + 1000
    draws = {name: uniform(ids, 5, 2, f"random_crop.0.{name}") for name in ("top", "left")}
    expected = []
    for row, image in enumerate(images):
        padded = reference.pad(image, [padding])
        top, left = (int(draws[name][row].double() * (2 * padding + 1)) for name in ("top", "left"))
        expected.append(padded[:, top : top + 12, left : left + 9])
    cropped = plain([RandomCrop(padding=padding)], channels, seed=5)(images, ids, epoch=2)
    assert torch.equal((cropped * 255).round().to(torch.uint8), torch.stack(expected))


def test_every_place_of_a_crop_is_equally_likely() -> None:
    image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[0, 0, 2, 2] = 255
    count = 9 * 500
    cropped = plain([RandomCrop(padding=1)], 1)(image.expand(count, -1, -1, -1), torch.arange(count), epoch=0)
    places = cropped.sum(dim=0).flatten()
    assert int((places > 0).sum()) == 9
    assert stats.chisquare(places[places > 0].numpy()).pvalue > 1e-3


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_flips_mirror_about_a_share_p_of_the_samples(p: float) -> None:
    images = images_of(1).expand(4000, -1, -1, -1)
    result = plain([RandomHorizontalFlip(p=p)])(images, torch.arange(4000), epoch=0)
    straight, mirrored = plain([]).normalize(images[:1]), plain([]).normalize(reference.horizontal_flip(images[:1]))
    flipped = (result == mirrored).flatten(1).all(1)
    assert torch.equal(flipped, ~(result == straight).flatten(1).all(1))
    assert stats.binomtest(int(flipped.sum()), 4000, p).pvalue > 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_torchvisions_with_the_same_factors(channels: int) -> None:
    images, ids = images_of(40, channels), torch.arange(40)
    result = plain([JITTER], channels)(images, ids, epoch=0)
    for row in range(40):
        expected = images[row].float() / 255
        for name in ("brightness", "contrast", "saturation"):
            amount = getattr(JITTER, name)
            factor = 1 - amount + 2 * amount * float(uniform(ids, 0, 0, f"color_jitter.0.{name}")[row])
            expected = getattr(reference, f"adjust_{name}")(expected, factor)
        torch.testing.assert_close(result[row], expected, atol=3e-5, rtol=0)


def test_jitter_factors_stay_in_their_interval() -> None:
    images = torch.full((2000, 1, 2, 2), 100, dtype=torch.uint8)
    bright = plain([ColorJitter(brightness=0.5)], 1)(images, torch.arange(2000), epoch=0)[:, 0, 0, 0] * 255 / 100
    assert stats.kstest(bright.numpy(), stats.uniform(0.5, 1.0).cdf).pvalue > 1e-3
    wide = plain([ColorJitter(brightness=1.5)], 1)(images, torch.arange(2000), epoch=0)[:, 0, 0, 0] * 255 / 100
    assert float(wide.min()) >= 0 and stats.kstest(wide.numpy(), stats.uniform(0.0, 2.5).cdf).pvalue > 1e-3


def test_saturation_leaves_grayscale_images_alone() -> None:
    images = images_of(5, channels=1)
    augment = normalized([ColorJitter(saturation=0.9)], channels=1)
    assert torch.equal(augment(images, torch.arange(5), epoch=0), augment.normalize(images))


def test_normalization_is_torchvisions() -> None:
    images = images_of(4)
    expected = reference.normalize(images.float() / 255, [0.45, 0.4, 0.35], [0.2, 0.3, 0.25])
    torch.testing.assert_close(normalized([]).normalize(images), expected, atol=2e-6, rtol=1e-6)
    assert torch.equal(normalized([])(images, torch.arange(4), epoch=3), normalized([]).normalize(images))


def test_normalization_rounds_after_each_operation() -> None:
    """The bits of the inputs are defined by float32 arithmetic, whatever kernels a device has."""
    images = images_of(7, 3, 23, 21)
    scale = (1 / (255 * np.array([0.2, 0.3, 0.25]))).astype(np.float32).reshape(3, 1, 1)
    shift = (-np.array([0.45, 0.4, 0.35]) / np.array([0.2, 0.3, 0.25])).astype(np.float32).reshape(3, 1, 1)
    expected = images.numpy().astype(np.float32) * scale + shift
    assert np.array_equal(normalized([]).normalize(images).numpy(), expected)


def test_two_steps_of_one_name_draw_apart_and_do_not_disturb_the_others() -> None:
    images, ids = images_of(1).expand(200, -1, -1, -1), torch.arange(200)
    twice = plain([RandomHorizontalFlip(), RandomHorizontalFlip()])(images, ids, epoch=0)
    flipped_once = ~(twice == plain([]).normalize(images)).flatten(1).all(1)
    assert 60 < int(flipped_once.sum()) < 140, "equal draws would cancel each other"
    jittered = plain([ColorJitter(brightness=0.3), RandomCrop(padding=2)])(images, ids, epoch=0)
    with_flip_of_none = plain([RandomHorizontalFlip(p=0.0), ColorJitter(brightness=0.3), RandomCrop(padding=2)])
    assert torch.equal(with_flip_of_none(images, ids, epoch=0), jittered)


def test_a_new_step_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Invert:
        name = "invert"
        draws = ("invert",)

        def __init__(self, settings: Any) -> None:
            pass

        def __call__(self, images: torch.Tensor, *draws: torch.Tensor) -> torch.Tensor:
            return torch.where((draws[0] < 0.5).view(-1, 1, 1, 1), 255 - images, images)

    monkeypatch.setitem(STEPS, "invert", Invert)
    black = torch.zeros(500, 3, 2, 2, dtype=torch.uint8)
    result = plain([Invert(None)])(black, torch.arange(500), epoch=0)  # type: ignore[list-item]
    assert 200 < int(result[:, 0, 0, 0].sum()) < 300
