"""Images per second from JPEG files, cropped, flipped and normalized: image_folder beside torchvision and litData.

    python benchmarks/jpeg.py [--images 2048] [--batch 64] [--rounds 5] [--workers 2] [--quality 90] [--noise 8]

Ours: `image_folder` with random_resized_crop and random_horizontal_flip through a rank's loader, float32 and
normalized, in the memory format of configs/image_folder.yaml (--no-channels-last: the other one); from the files, and
from a pack of 256 pixels (`dist-train pack`). The reference:
`torchvision.datasets.ImageFolder` with PIL in a DataLoader, with the transforms of torchvision's
references/classification (RandomResizedCrop(224), RandomHorizontalFlip, PILToTensor, ConvertImageDtype, Normalize).
litData (`pip install litdata`): `optimize`, then a StreamingDataset with the same transforms on tensors; of the JPEG
files as they are, and of uint8 tensors with a shorter edge of 256, like our pack. All read the same pictures in turns,
with the same number of workers on the same cores. Batches that the workers prefetched are used up before each round's
clock starts. Medians count, and ratios to the reference.

"packed, first epoch" is the time of packing, once, plus that of an epoch. This script makes the files: 500x375, smooth
shapes under noise (quality 90, noise 8: about 70 kB). Noise makes decoding slower. The time of decoding alone is
printed as well. Bars: 1.8 from the files, 6 from the pack, and ahead of litData. One that is missed exits with 1.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from dist_train.config.data import DataConfig, RandomHorizontalFlip, RandomResizedCrop
from dist_train.data.augment.steps import Augmentation
from dist_train.data.datasets.image_folder import ImageFiles, image_folder
from dist_train.data.datasets.image_packs import pack_images
from dist_train.data.loader import Source, TrainLoader
from dist_train.data.sampler import ElasticDistributedSampler

BARS = {"ours, files": 1.8, "ours, packed": 6.0}
REFERENCE = "torchvision, PIL"
PACKED = 256
AHEAD = 8  # batches that workers may have made before a round
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_photos(root: Path, count: int, quality: int, noise: float) -> None:
    generator = np.random.default_rng(0)
    for split, images in (("train", count), ("val", 2)):
        for number in range(images):
            folder = root / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(generator.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
            pixels += generator.normal(0, noise, pixels.shape).astype(np.float32)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.jpg", quality=quality)


def _config(root: Path, pack: int | str) -> DataConfig:
    augment = [RandomResizedCrop(), RandomHorizontalFlip()]
    return DataConfig(
        name="image_folder", root=root, augment=augment, cache_dir=root.parent / "cache", args={"pack": pack}
    )


def ours(root: Path, batch: int, workers: int, pack: int | str, channels_last: bool) -> Iterator[int]:
    """Yields the sizes of batches."""
    config = _config(root, pack)
    splits = image_folder(config)
    assert isinstance(splits.train, ImageFiles)
    rest = config.augment[splits.train.own_steps :]
    augmentation = Augmentation(rest, seed=0, mean=splits.mean, std=splits.std)
    source = Source(splits.train, augmentation, torch.device("cpu"), channels_last, workers, 0)
    sampler = ElasticDistributedSampler(splits.train, 1, 0, global_batch_size=batch, drop_last=True)
    loader = TrainLoader(source, sampler, None)
    for epoch in range(1_000_000):
        for step in loader.epoch(epoch, 0, loader.steps_per_epoch):
            assert step.micro_batches[0].inputs.shape == (batch, 3, 224, 224)
            yield step.rows


def reference(root: Path, batch: int, workers: int) -> Iterator[int]:
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, antialias=True),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(_MEAN, _STD),
        ]
    )
    dataset = torchvision.datasets.ImageFolder(str(root / "train"), transform)
    loader = DataLoader(
        dataset, batch, shuffle=True, num_workers=workers, persistent_workers=True, drop_last=True, prefetch_factor=4
    )
    while True:
        for images, _ in loader:
            yield len(images)


def as_file(path: str) -> dict[str, Any]:
    """Returns an item for litData that keeps the file's bytes."""
    return {"image": Image.open(path), "class": int(path.split("class")[-1][0])}


def as_tensor(path: str) -> dict[str, Any]:
    """Returns an item for litData like one of our pack."""
    image = v2.functional.resize(decode_jpeg(read_file(path), mode=ImageReadMode.RGB), [PACKED], antialias=True)
    return {"image": image, "class": int(path.split("class")[-1][0])}


def litdata(root: Path, batch: int, workers: int) -> Iterator[int]:
    from litdata import StreamingDataLoader, StreamingDataset

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(_MEAN, _STD),
        ]
    )

    class Pictures(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            item = super().__getitem__(index)
            return transform(item["image"]), item["class"]

    dataset = Pictures(str(root), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(
        dataset, batch_size=batch, num_workers=workers, persistent_workers=True, drop_last=True, prefetch_factor=4
    )
    while True:
        for images, _ in loader:
            assert images.shape[1:] == (3, 224, 224) and images.dtype == torch.float32
            yield len(images)


def write_litdata(root: Path, folder: Path, workers: int) -> dict[str, float]:
    """Optimizes the files for litData in two ways; returns the seconds of each."""
    from litdata import optimize

    files, seconds = [str(path) for path in sorted((root / "train").rglob("*.jpg"))], {}
    for name, item in (("files", as_file), ("packed", as_tensor)):
        start = time.perf_counter()
        # Its default, spawn, would become that of all worker processes here.
        more: dict[str, Any] = {"num_workers": workers, "start_method": "fork", "verbose": False}
        optimize(item, files, str(folder / name), chunk_bytes="64MB", **more)
        seconds[f"litData, {name}"] = time.perf_counter() - start
    return seconds


def size_of(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


class Round(NamedTuple):
    """Images per second, and milliseconds of processor time an image of this process and its workers."""

    rate: float
    cpu: float


def measured(batches: Iterator[int], images: int) -> Round:
    """Measures the next batches of at least `images` images, after the prefetched ones."""
    wait_for_workers()
    for _ in range(AHEAD):
        next(batches)
    start, cpu, done = time.perf_counter(), processor_seconds(), 0
    while done < images:
        done += next(batches)
    return Round(done / (time.perf_counter() - start), (processor_seconds() - cpu) / done * 1e3)


def wait_for_workers() -> None:
    """Waits until the workers of the other ways, which fetch ahead after their round, have nothing to do."""
    for _ in range(100):
        before = processor_seconds()
        time.sleep(0.1)
        if processor_seconds() - before < 0.02:
            return


def processor_seconds() -> float:
    """Returns the processor time of this process and its living descendants."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [own, *own.children(recursive=True)])


def decoding(files: list[Path]) -> dict[str, float]:
    """Returns the milliseconds to decode a file on one thread, medians of 5 turns."""
    ways = {
        "torchvision.io": lambda path: decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB),
        "PIL": lambda path: Image.open(path).convert("RGB"),
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, decode in ways.items():
            start = time.perf_counter()
            for path in files:
                decode(path)
            took[name].append((time.perf_counter() - start) / len(files) * 1e3)
    return {name: statistics.median(values) for name, values in took.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048, help="files, and images of a round")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--noise", type=float, default=8.0)
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        write_photos(root, options.images, options.quality, options.noise)
        files = sorted((root / "train").rglob("*.jpg"))
        common = {"batch": options.batch, "workers": options.workers}
        start = time.perf_counter()
        pack_images(_config(root, PACKED), options.workers, lambda text: None, lambda: False, show=False)
        once = {"ours, packed": time.perf_counter() - start}
        disk = {"files": size_of(root / "train"), "ours, packed": size_of(Path(folder) / "cache")}
        paths = {
            REFERENCE: partial(reference, root, **common),
            "ours, files": partial(ours, root, pack="off", channels_last=options.channels_last, **common),
            "ours, packed": partial(ours, root, pack=PACKED, channels_last=options.channels_last, **common),
        }
        try:
            once |= write_litdata(root, Path(folder) / "litdata", options.workers)
        except ModuleNotFoundError as error:
            print(f"litData is left out: {error}; pip install litdata")
        for name in (name for name in once if name.startswith("litData")):
            place = Path(folder) / "litdata" / name.rpartition(" ")[2]
            disk[name], paths[name] = size_of(place), partial(litdata, place, **common)
        found = in_turns({name: make() for name, make in paths.items()}, options.images, options.rounds)
        alone = decoding(files[:64])

    versions = f"torch {torch.__version__} torchvision {torchvision.__version__}"
    print(f"{datetime.date.today()} {versions} ({os.cpu_count()} cores, load {load_before:.1f} before)")
    size = disk["files"] / options.images * 1000
    print(f"{options.images} JPEGs of 500x375, {size:.0f} kB, batch {options.batch}, {options.workers} workers each")
    medians = {name: statistics.median(each.rate for each in rounds) for name, rounds in found.items()}
    for name, rounds in found.items():
        bounds = f"from {min(rounds).rate:,.0f} to {max(rounds).rate:,.0f}"
        cpu = statistics.median(each.cpu for each in rounds)
        ratio = median_ratio(found, name, REFERENCE)
        print(f"{name:18} {medians[name]:8,.0f} images/s ({bounds}), {ratio:.2f}; {cpu:.2f} ms of a core an image")
    for name, seconds in once.items():
        first = options.images / (seconds + options.images / medians[name])
        speed = f"{first:,.0f} images/s, {first / medians[REFERENCE]:.2f}"
        print(f"{name}: {seconds:.1f} s once; with it the first epoch {speed}")
    print("disk: " + ", ".join(f"{name} {megabytes:,.1f} MB" for name, megabytes in disk.items()))
    print("decoding alone: " + ", ".join(f"{name} {value:.2f} ms" for name, value in alone.items()))
    return judged(found)


def in_turns(batches: dict[str, Iterator[int]], images: int, rounds: int) -> dict[str, list[Round]]:
    """Measures each way, a round of all of them after the other."""
    for each in batches.values():
        measured(each, images // 4)  # starts the workers
    found: dict[str, list[Round]] = {name: [] for name in batches}
    for _ in range(rounds):
        for name, each in batches.items():
            found[name].append(measured(each, images))
    return found


def median_ratio(found: dict[str, list[Round]], name: str, other: str) -> float:
    """Returns the median of the rounds' ratios of images per second."""
    return statistics.median(a.rate / b.rate for a, b in zip(found[name], found[other], strict=True))


def judged(found: dict[str, list[Round]]) -> int:
    """Prints the bars; returns the exit code."""
    code = 0
    pairs = [(name, REFERENCE, bar) for name, bar in BARS.items()]
    pairs += [(f"ours, {name}", f"litData, {name}", 1.0) for name in ("files", "packed")]
    for name, other, bar in pairs:
        if other in found:
            ratio = median_ratio(found, name, other)
            print(f"{name} / {other}: {ratio:.2f} (at least {bar}: {'passed' if ratio >= bar else 'FAILED'})")
            code |= ratio < bar
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
