"""Images per second of Fashion-MNIST with augmentation: our batched path against torchvision's per-sample one.

    python benchmarks/data.py [--batch 512] [--rounds 5] [--images 8192] [--threads 1] [--padding 2]

Ours: the main process gathers rows from memory-mapped arrays in the sampler's order, and augments them as a batch.
The reference: PIL images through RandomCrop, RandomHorizontalFlip, ToTensor and Normalize in a DataLoader with 2
workers, which are started before its clock. Rounds alternate; medians count. Synthetic images of the same size are
used if Fashion-MNIST is not available.

One thread of ours is compared with two worker processes, because a node runs as many ranks as it has cores. A second
thread gains nothing with images of this size, where it mostly waits: the ratio was 17 to 19 with 2 threads and 31 with
one. The expected ratio on 2 idle cores is at least 25; the script exits with 1 below it. It also prints the load at
its start.
"""

import argparse
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from dist_train.config.data import DataConfig, RandomCrop, RandomHorizontalFlip
from dist_train.data.arrays import ImageArrays
from dist_train.data.augment.steps import Augmentation
from dist_train.data.datasets.fake import fake
from dist_train.data.datasets.mnist import fashion_mnist
from dist_train.data.open_splits import open_splits
from dist_train.data.sampler import ElasticDistributedSampler
from dist_train.data.splits import Splits
from dist_train.distributed.world import World
from dist_train.errors import DataError

BAR = 25.0


class Reference(Dataset[Any]):
    """Dataset in the style of torchvision's MNIST: makes a PIL image of a tensor row and transforms it."""

    def __init__(self, arrays: ImageArrays, transform: Any) -> None:
        self.images, self.targets, self.transform = arrays.images, arrays.targets, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        image = Image.fromarray(self.images[row, 0].numpy(), mode="L")
        return self.transform(image), int(self.targets[row])


def ours(splits: Splits, batch: int, padding: int) -> Iterator[int]:
    """Yields the sizes of augmented batches."""
    train = splits.train
    assert isinstance(train, ImageArrays)
    sampler = ElasticDistributedSampler(train, 1, 0, global_batch_size=batch)
    steps = [RandomCrop(padding=padding), RandomHorizontalFlip()]
    augment = Augmentation(steps, seed=0, mean=splits.mean, std=splits.std)
    for epoch in range(1_000_000):
        sampler.set_epoch(epoch)
        for step in range(sampler.num_steps):
            rows = train.gather(sampler.rank_slice(step).ids)
            yield len(augment(rows.inputs, rows.ids, epoch))


def reference(splits: Splits, batch: int, padding: int) -> Iterator[int]:
    assert isinstance(splits.train, ImageArrays)
    transform = transforms.Compose(
        [
            transforms.RandomCrop(splits.input_shape[1:], padding=padding),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(splits.mean, splits.std),
        ]
    )
    dataset = Reference(splits.train, transform)
    loader = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=2, persistent_workers=True)
    while True:
        for images, _ in loader:
            yield len(images)


def rate(batches: Iterator[int], images: int) -> float:
    """Returns images per second over the next batches of at least `images` images."""
    start, done = time.perf_counter(), 0
    while done < images:
        done += next(batches)
    return done / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--images", type=int, default=8192, help="images of a round of the reference; ours takes 16 times as many"
    )
    parser.add_argument("--threads", type=int, default=1, help="of ours; the reference has two workers")
    parser.add_argument("--padding", type=int, default=2)
    parser.add_argument("--root", type=Path, default=None, help="folder of Fashion-MNIST's four files")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_before = os.getloadavg()[0]

    with tempfile.TemporaryDirectory() as folder:
        try:
            data = DataConfig(name="fashion_mnist", root=options.root, cache_dir=Path(folder))
            splits = open_splits(lambda: fashion_mnist(data), Path(folder), World())
        except DataError:
            size = {"num_train": 60_000, "channels": 1, "height": 28, "width": 28}
            data = DataConfig(name="fake", args=size)
            splits = open_splits(lambda: fake(data), Path(folder), World())
        paths = {
            "dist_train": (ours(splits, options.batch, options.padding), 16 * options.images),
            "torchvision": (reference(splits, options.batch, options.padding), options.images),
        }
        for batches, images in paths.values():
            rate(batches, images // 2)  # starts workers, reads the files into the page cache
        rates: dict[str, list[float]] = {name: [] for name in paths}
        for _ in range(options.rounds):
            for name, (batches, images) in paths.items():
                rates[name].append(rate(batches, images))

    versions = f"torch {torch.__version__} torchvision {torchvision.__version__}"
    load = f"{os.cpu_count()} cores, load {load_before:.1f} before"
    print(f"{datetime.date.today()} {versions} threads {torch.get_num_threads()} ({load})")
    print(f"{data.name}, batch {options.batch}, padding {options.padding}, {options.rounds} rounds")
    for name, values in rates.items():
        print(f"{name:12} {statistics.median(values):10,.0f} images/s  (from {min(values):,.0f} to {max(values):,.0f})")
    ratio = statistics.median(rates["dist_train"]) / statistics.median(rates["torchvision"])
    print(f"ratio        {ratio:10.1f}  (at least {BAR:.0f}: {'passed' if ratio >= BAR else 'FAILED'})")
    return 0 if ratio >= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
