"""Accuracy with random resized crops of packed images beside those of the files, on a generated set, by seed.

    python benchmarks/packed_accuracy.py [--seeds 3] [--images 60] [--epochs 16]

This script makes photographs of 80x60: ten classes that differ in the direction and the period of a fine pattern,
which scaling blurs, under noise and at random brightness. small_resnet is trained on crops of 24 of them: from the
files, and from packs of 27 pixels, raw and JPEG. Evaluation scales the shorter edge to 27 in all three, so that files
and the raw pack are evaluated on the same pixels. Prints top-1 of each seed, and the mean of the paired differences.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import dist_train

SIZE, RESIZE, CLASSES = 24, 27, 10
WAYS: dict[str, dict[str, Any]] = {
    "files": {"pack": "off"},
    "packed, raw": {"pack": RESIZE},
    "packed, jpeg": {"pack": RESIZE, "pack_format": "jpeg"},
}


def write_patterns(root: Path, train: int, val: int) -> None:
    generator = np.random.default_rng(0)
    across, down = np.meshgrid(np.arange(80), np.arange(60))
    for split, count in (("train", train), ("val", val)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            angle, period = np.pi * (label % 5) / 5, 5.0 + 4.0 * (label // 5)
            for number in range(count):
                phase, turn = generator.uniform(0, 2 * np.pi), generator.normal(0, 0.1)
                along = across * np.cos(angle + turn) + down * np.sin(angle + turn)
                wave = generator.uniform(10, 40) * np.sin(2 * np.pi * along / period + phase)
                pixels = generator.uniform(60, 190, 3) + wave[..., None] + generator.normal(0, 12, (60, 80, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03d}.jpg", quality=92)


def top1(folder: Path, way: str, seed: int, epochs: int) -> float:
    config = dist_train.load_config(
        "quickstart",
        [
            *("--data.name", "image_folder", "--data.root", str(folder / "images"), "--data.workers", "1"),
            *("--data.args", str({"size": SIZE, "resize": RESIZE, **WAYS[way]})),
            *("--data.augment", "[{name: random_resized_crop}]"),
            *("--data.cache_dir", str(folder / "cache"), "--data.global_batch_size", "32"),
            *("--run.dir", str(folder / f"{way} {seed}"), "--run.seed", str(seed), "--run.device", "cpu"),
            *("--stages", "[train]", "--train.epochs", str(epochs), "--train.optim.lr", "0.05"),
        ],
    )
    return float(dist_train.run(config)["models"]["fp32"]["top1"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=60, help="of a class, to train; half as many to evaluate")
    parser.add_argument("--epochs", type=int, default=16)
    options = parser.parse_args()
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        write_patterns(Path(folder) / "images", options.images, options.images // 2)
        for seed in range(options.seeds):
            for way, values in found.items():
                values.append(top1(Path(folder), way, seed, options.epochs))
    print(f"{datetime.date.today()} torch {torch.__version__}")
    for way, values in found.items():
        pairs = [value - files for value, files in zip(values, found["files"], strict=True)]
        shown = ", ".join(f"{value:.2%}" for value in values)
        print(f"{way:13} {statistics.mean(values):.2%} ({shown}), {statistics.mean(pairs) * 100:+.2f} points")


if __name__ == "__main__":
    main()
