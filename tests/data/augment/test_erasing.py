"""Random erasing: rectangles of the mean, of the sizes that were asked for."""

from __future__ import annotations

import pytest
import torch

from dist_train.config.data import RandomErasing
from dist_train.data.augment.steps import Augmentation

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def erased(settings: RandomErasing, batch: int = 600, height: int = 40, width: int = 30) -> torch.Tensor:
    """Marks the erased pixels of white images: bool [B, H, W]."""
    images = torch.full((batch, 3, height, width), 255, dtype=torch.uint8)
    result = Augmentation([settings], seed=1, mean=MEAN, std=STD)(images, torch.arange(batch), epoch=2)
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    holes = (result - white.view(3, 1, 1)).abs() > 1e-4
    assert torch.equal(holes.any(1), holes.all(1)), "all channels of a pixel or none"
    assert bool((result[holes].abs() < 1e-5).all()), "the mean, which is 0 when normalized"
    return holes[:, 0]


def test_holes_are_rectangles_of_the_areas_and_ratios_asked_for() -> None:
    holes = erased(RandomErasing(p=1.0, scale=(0.05, 0.2), ratio=(0.5, 2.0)))
    rows, columns = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(rows * columns, holes.sum((1, 2))), "rectangles"
    shares, ratios = (rows * columns) / (40 * 30), rows / columns
    # Sides are rounded to pixels: half a pixel of about eight.
    assert float(shares.min()) > 0.04 and float(shares.max()) < 0.22
    assert 0.44 < float(ratios.min()) < 0.6 and 1.7 < float(ratios.max()) < 2.3
    assert float(shares.mean()) == pytest.approx(0.125, abs=0.01)
    tops = holes.any(2).float().argmax(1)
    assert int(tops.min()) == 0 and int((tops + rows).max()) == 40 and len(tops.unique()) > 25


def test_a_share_p_of_the_images_is_erased() -> None:
    assert float(erased(RandomErasing(p=0.3)).flatten(1).any(1).float().mean()) == pytest.approx(0.3, abs=0.06)


def test_an_image_that_no_rectangle_fits_into_is_left_alone() -> None:
    assert not erased(RandomErasing(p=1.0, scale=(0.9, 1.0), ratio=(3.0, 3.3)), batch=50).any()
