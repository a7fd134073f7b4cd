"""Small folders of image files, written by the test that needs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ((220, 40, 40), (40, 200, 60), (50, 60, 210))


def photo(seed: int, colour: tuple[int, int, int], height: int = 48, width: int = 60) -> Image.Image:
    """An image of smooth noise around a colour."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(-60, 60, (4, 5, 3)) + np.array(colour)
    return Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def write_folder(root: Path, train: int = 8, val: int = 3, classes: int = 3) -> Path:
    """Writes train/ and val/ with the given number of JPEGs per class, one colour per class."""
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = photo(100 * label + number + (50 if split == "val" else 0), COLOURS[label])
                image.save(folder / f"{number:03d}.jpg", quality=90)
    return root


def damage(path: Path) -> None:
    """Truncates an image file in the middle."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
