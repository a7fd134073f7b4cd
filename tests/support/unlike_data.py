"""Datasets that are not the same on rank 1: --import tests.support.unlike_data."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

import dist_train
from dist_train.config.data import DataConfig, SplitConfig
from dist_train.data.datasets.image_folder import image_folder
from dist_train.data.division import divided
from dist_train.data.open_splits import open_splits
from dist_train.distributed.world import World
from dist_train.errors import DataError
from dist_train.pipeline.same_data import require_same_on_all_ranks
from tests.support.image_files import write_folder

ROWS = 40


class Rows(Dataset[Any]):
    """Items by id.

    Args:
        others: ids of items with other content.
        noise: what is added of a generator that nothing seeds.
        factor: multiplies the images.
        broken: id of an item that cannot be read.
    """

    def __init__(
        self,
        rows: int = ROWS,
        others: Sequence[int] = (),
        *,
        shift: int = 0,
        noise: float = 0.0,
        factor: float = 1.0,
        label: type = int,
        broken: int | None = None,
        fingerprint: str | None = None,
    ) -> None:
        self._rows, self._others, self._shift, self._noise = rows, others, shift, noise
        self._factor, self._label, self._broken, self.fingerprint = factor, label, broken, fingerprint
        self._generator = np.random.default_rng()

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        if index == self._broken:
            raise OSError("the disk is gone")
        generator = torch.Generator().manual_seed(index + 1000 * (index in self._others))
        drawn = torch.rand(1, 4, 4)  # from the global generator, as augmentation in a dataset does
        image = torch.rand(1, 4, 4, generator=generator) + 0.1 * drawn
        image += self._noise * torch.from_numpy(self._generator.random((1, 4, 4)))
        return image * self._factor, self._label((index + self._shift) % 2)


class Stream(IterableDataset[Any]):
    def __init__(self, first: int = 0) -> None:
        self._first = first

    def __iter__(self) -> Iterator[Any]:
        rows = Rows()
        return (rows[index] for index in range(self._first, ROWS))


def plain() -> dist_train.Splits:
    return dist_train.Splits(Rows(), Rows(10), 2, ("cat", "dog"))


def arrays(seed: int) -> dist_train.Splits:
    images = torch.randint(0, 256, (6, 1, 4, 4), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    rows = dist_train.ImageArrays(images, torch.arange(6) % 2)
    return dist_train.Splits(rows, rows, 2, mean=(0.5,), std=(0.5,))


def stream(first: int) -> dist_train.Splits:
    return dist_train.Splits(Stream(first), Rows(10), 2, steps_per_epoch=4)


def pair(case: str) -> tuple[dist_train.Splits, ...]:
    """Returns what the other ranks see, and what rank 1 sees."""
    same = plain()
    unlike = {
        "nothing": same,
        "a row less": replace(same, train=Rows(ROWS - 1)),
        "evaluation only": replace(same, eval=Rows(9)),
        "other content": replace(same, train=Rows(others=range(ROWS))),
        "one item": replace(same, train=Rows(others=[ROWS // 2])),
        "other labels": replace(same, eval=Rows(10, shift=1)),
        "float labels": replace(same, train=Rows(label=float)),
        "class order": replace(same, classes=("dog", "cat")),
        "statistics": replace(same, mean=(0.5,), std=(0.25,)),
        "unreadable": replace(same, train=Rows(broken=ROWS - 1)),
        "kind": replace(arrays(0), train=same.train),
        "rounding": replace(same, train=Rows(factor=1.00001)),
    }
    if case in unlike:
        return same, unlike[case]
    return {
        "small integers": (replace(same, train=Rows(label=np.int16)), replace(same, train=Rows(label=np.uint8))),
        "stated": 2 * (replace(same, train=Rows(fingerprint="one")),),
        "two fingerprints": (
            replace(same, train=Rows(fingerprint="one")),
            replace(same, train=Rows(fingerprint="other")),
        ),
        "array beside rows": tuple(replace(same, eval=arrays(seed).eval, mean=(0.5,), std=(0.5,)) for seed in (0, 1)),
        "unreadable on all": 2 * (replace(same, train=Rows(broken=0)),),
        "random": 2 * (replace(same, train=Rows(noise=1.0)),),
        "stream": (stream(0), stream(0)),
        "sharded stream": (stream(0), stream(1)),
        "kinds": (arrays(0), same),
    }[case]


BY_GROUP = SplitConfig(eval=0.25, by="group")


def by_group(first: int) -> dist_train.Splits:
    """Divides rows whose groups, of four rows each, begin at a row."""
    rows: Any = Rows()
    rows.groups = (np.arange(first, ROWS + first) // 4).tolist()
    splits = divided(dist_train.Splits(rows, None, 2), BY_GROUP)
    return replace(splits, fingerprint=str(getattr(splits.train, "fingerprint", None)))


def of_node(world: World) -> dist_train.Splits:
    """Opens image arrays that have other content on each of two nodes, of one rank each."""
    with tempfile.TemporaryDirectory() as folder:
        alone = replace(world, local_rank=0, local_world_size=1)
        return open_splits(lambda: arrays(world.rank), Path(folder), alone)


def compare_folders(world: World) -> list[str]:
    """Returns the error, or "", of each rank's own copy of an image folder, then of one with a changed picture."""
    told = []
    with tempfile.TemporaryDirectory() as folder:
        root = write_folder(Path(folder))
        os.utime(root / "train/class1/001.jpg", (world.rank, world.rank))
        for changed in (False, True):
            picture = root / "train/class0/000.jpg"
            content = picture.read_bytes()
            picture.write_bytes(content[:-20] + bytes([content[-20] ^ (changed and world.rank == 1)]) + content[-19:])
            data = DataConfig(name="image_folder", root=root)
            splits = replace(image_folder(data), fingerprint="names and sizes")
            try:
                require_same_on_all_ranks(data, splits, 0, world, told.append)
                told.append("")
            except DataError as error:
                told.append(str(error).replace(str(root), "ROOT"))
    return told


def compare(world: World, cases: Sequence[str]) -> list[list[str]]:
    """Returns, for each case, the error or "", then the warnings."""
    told = []
    for case in cases:
        warnings: list[str] = []
        data = DataConfig(name="unlike", split=BY_GROUP if case == "groups" else None)
        if case == "groups":
            splits = by_group(world.rank)
        else:
            splits = of_node(world) if case == "nodes" else pair(case)[world.rank == 1]
        if not splits.fingerprint:
            splits = replace(splits, fingerprint=str(getattr(splits.train, "fingerprint", None)))
        try:
            require_same_on_all_ranks(data, splits, 0, world, warnings.append)
            told.append(["", *warnings])
        except DataError as error:
            told.append([str(error), *warnings])
    return told


class Changing:
    """The rows of the dataset `changing`, for a test that changes them between two starts."""

    rows = Rows()


@dist_train.register_dataset("changing")
def changing(data: dist_train.DataConfig) -> dist_train.Splits:
    return dist_train.Splits(Changing.rows, Rows(10), 2)


@dist_train.register_dataset("unlike")
def unlike(data: dist_train.DataConfig) -> dist_train.Splits:
    return pair(data.args["case"])[os.environ.get("RANK") == "1"]
