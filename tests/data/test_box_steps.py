"""Mirrors and crops move an image's boxes with its pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_train.config.data import ColorJitter, RandomCrop, RandomHorizontalFlip, RandomResizedCrop
from dist_train.data.box_steps import BoxSteps, padded
from dist_train.errors import ConfigError

FLIP = RandomHorizontalFlip(p=1.0)
CROP = RandomResizedCrop(scale=(0.3, 0.9))


def marked(height: int = 40, width: int = 60) -> tuple[Tensor, Tensor]:
    """Returns an image with one white rectangle on black, and its box."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, 8:24, 30:54] = 255
    return image, torch.tensor([[1.0, 30, 8, 54, 24]])


def around(image: Tensor) -> list[float]:
    """Returns the box of the bright pixels."""
    rows, columns = (image[0] > 127).nonzero(as_tuple=True)
    return [float(each) for each in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]


def test_scaling_moves_the_box() -> None:
    image, rows = BoxSteps([], 120).plain(*marked())
    assert image.shape == (3, 120, 120) and image.dtype == torch.uint8
    assert rows.tolist() == [[1.0, 60.0, 24.0, 108.0, 72.0]]
    assert around(image) == pytest.approx(rows[0, 1:].tolist(), abs=1.5)


def test_a_mirror_moves_the_box_and_twice_is_none() -> None:
    steps = BoxSteps([FLIP], 60)
    image, rows = steps.augmented(*marked(60, 60), seed=0)
    assert around(image) == rows[0, 1:].tolist() == [6.0, 8.0, 30.0, 24.0]
    back, again = BoxSteps([FLIP, FLIP], 60).augmented(*marked(60, 60), seed=0)
    assert torch.equal(back, marked(60, 60)[0]) and torch.equal(again, marked(60, 60)[1])


@pytest.mark.parametrize("steps", [[CROP], [CROP, FLIP], [FLIP, CROP], [CROP, FLIP, CROP, FLIP]])
def test_boxes_stay_around_their_pixels(steps: list[RandomHorizontalFlip | RandomResizedCrop]) -> None:
    found = 0
    for seed in range(20):
        image, rows = BoxSteps(steps, 80).augmented(*marked(), seed=seed)
        again = BoxSteps(steps, 80).augmented(*marked(), seed=seed)
        assert torch.equal(image, again[0]) and torch.equal(rows, again[1])
        found += len(rows)
        for row in rows:
            assert row[0] == 1 and around(image) == pytest.approx(row[1:].tolist(), abs=2.0)
    assert 5 < found <= 20


def test_a_box_whose_centre_is_cut_off_is_left_out() -> None:
    steps = BoxSteps([RandomResizedCrop(scale=(0.05, 0.05))], 32)
    kept = [len(steps.augmented(*marked(), seed=seed)[1]) for seed in range(20)]
    assert set(kept) == {0, 1}


def test_the_leading_steps_are_its_own_and_later_ones_are_refused() -> None:
    jitter = ColorJitter(brightness=0.2)
    assert BoxSteps([CROP, FLIP, jitter], 32).count == 2
    for later in (FLIP, RandomCrop()):
        with pytest.raises(ConfigError) as caught:
            BoxSteps([jitter, later], 32)
        assert caught.value.problems[0].place == "data.augment.1"
        assert "would move the images, but not their boxes" in caught.value.problems[0].message


def test_padding_is_masked() -> None:
    made = padded(torch.tensor([[2.0, 0, 0, 4, 4]]), 3)
    assert made["boxes"].shape == (3, 5) and made["mask"].tolist() == [True, False, False]
    assert padded(torch.zeros(0, 5), 2)["mask"].tolist() == [False, False]


def test_a_box_that_scaling_makes_nothing_of_is_left_out() -> None:
    image = torch.zeros(3, 5000, 5000, dtype=torch.uint8)
    rows = torch.tensor([[0, 2502, 10, 2502.0002, 20], [1, 10, 10, 10.5, 20]])
    assert bool((rows[:, 3] > rows[:, 1]).all()), "both have an area in the file's pixels"
    assert BoxSteps([], 64).plain(image, rows)[1][:, 0].tolist() == [1]
