"""Opens a dataset on every rank: image arrays from one copy per node, anything else by the rank itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from dist_train.data.arrays import ImageArrays
from dist_train.data.items import reading, rows_in
from dist_train.data.splits import Splits
from dist_train.distributed.world import World
from dist_train.errors import DataError


def open_splits(make: Callable[[], Splits], directory: Path, world: World, name: str = "data") -> Splits:
    """Opens the dataset on every rank, its image arrays memory-mapped from one copy per node.

    The first rank of each node calls `make` and writes the arrays; the others map them. Where a split is not made of
    image arrays, every rank calls `make` itself. The first rank of a node goes before the others, so that files are
    downloaded once.

    Args:
        make: loads the dataset.
        directory: a folder of the node.
        world: the ranks of this run.
        name: of the dataset, for messages.

    Raises:
        DataError: the dataset cannot be loaded or stored, or has no evaluation set; the other ranks raise PeerError.
    """
    made: list[Splits] = []

    def write() -> dict[str, Any] | None:
        splits = _made(make, name)
        assert splits.eval is not None
        if not isinstance(splits.train, ImageArrays) or not isinstance(splits.eval, ImageArrays):
            made.append(splits)
            return None
        return {
            "train": splits.train.write(directory),
            "eval": splits.eval.write(directory),
            "num_classes": splits.num_classes,
            "num_outputs": splits.num_outputs,
            "classes": list(splits.classes),
            "mean": list(splits.mean),
            "std": list(splits.std),
            "resize": splits.resize,
            "dynamic": [[leaf, list(vary.items())] for leaf, vary in splits.dynamic.items()],
            "whole": splits.whole,
        }

    stored = world.first_on_node(write, "loading the dataset")
    if stored is None:
        splits = made[0] if made else _made(make, name)
        assert splits.eval is not None
        return replace(splits, fingerprint=" ".join(_fingerprint(split) for split in (splits.train, splits.eval)))
    return Splits(
        train=ImageArrays.open(directory / stored["train"]),
        eval=ImageArrays.open(directory / stored["eval"]),
        num_classes=stored["num_classes"],
        num_outputs=stored["num_outputs"],
        classes=tuple(stored["classes"]),
        mean=tuple(stored["mean"]),
        std=tuple(stored["std"]),
        resize=stored["resize"],
        dynamic={leaf: dict(vary) for leaf, vary in stored["dynamic"]},
        whole=stored["whole"],
        fingerprint=f"{stored['train']} {stored['eval']}",
    )


def _made(make: Callable[[], Splits], name: str) -> Splits:
    with reading(f"the dataset {name}"):
        splits: object = make()
    if not isinstance(splits, Splits):
        raise DataError(
            f"the function of the dataset {name} returned a {type(splits).__name__}, not Splits",
            "return dist_train.Splits(train, eval, num_classes)",
        )
    if splits.eval is None:
        raise DataError(
            f"the dataset {name} has no evaluation set",
            "--data.split.eval 0.1 makes one of a tenth of its training rows; or let it return one",
        )
    return splits


def _fingerprint(split: ImageArrays | Dataset[Any]) -> str:
    """Returns a dataset's attribute `fingerprint`, else its length; "stream" for an iterable one."""
    stated = getattr(split, "fingerprint", None)
    if stated is not None:
        return str(stated)
    return "stream" if isinstance(split, IterableDataset) else str(rows_in(split))
