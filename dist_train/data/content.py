"""Reads samples of a dataset's content, and tells whether two readings are of the same data.

A length says nothing of what the items are. So a few items are read at set-up, on every rank, and compared: over the
ranks, and at a resume with what the run began with.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dist_train.data.arrays import ImageArrays
from dist_train.data.items import Item, item_of, name_of, reading, rows_in, short
from dist_train.data.permutation import Permutation, derive_key
from dist_train.data.seeding import seed_everything
from dist_train.data.stack import Collate, Stack
from dist_train.errors import DistTrainError, escaped
from dist_train.trees import map_leaves, named_leaves

ITEMS = 16
"""Items of a split that are read at most."""
SECONDS = 1.0
"""Time after which no further item of a split is read; one always is."""
_VALUES = 64  # of a tensor's elements, at even places, by which rounding is told from other content
_ROUNDING = 0.02  # mean difference of these values, in units of their span, up to which it is rounding


@runtime_checkable
class OfFiles(Protocol):
    """A map-style dataset with a file for each item; the file's bytes are its content."""

    file_times: np.ndarray
    """int64 [N], time of each file's last change, ns."""

    def path(self, index: int) -> Path: ...

    def file_content(self, index: int) -> bytes: ...


@dataclass(frozen=True)
class Seen:
    """An item, as it was read.

    Attributes:
        shown: what it is, for messages, with all that must be equal: shapes, dtypes and a target that is no float.
        digest: hash of all its bytes; "" of one that cannot be read.
        values: float32, some elements of the input and of a float target; empty where the bytes must be equal.
    """

    shown: str
    digest: str
    values: bytes = b""

    def is_like(self, other: Seen) -> bool:
        """Tells whether both are the same item, but for rounding: of another CPU, or another version of a decoder."""
        if self.digest == other.digest:
            return True
        if self.shown != other.shown or not self.values or len(self.values) != len(other.values):
            return False
        pairs = np.frombuffer(self.values + other.values, np.float32).reshape(2, -1, _VALUES).astype(np.float64)
        spans = pairs.max((0, 2)) - pairs.min((0, 2))
        return bool((np.abs(pairs[0] - pairs[1]).mean(1) <= _ROUNDING * spans).all())


@dataclass(frozen=True)
class Content:
    """Items of one split, by id, in the order in which they were read.

    Attributes:
        random: its items are not the same when they are read again, so that they tell nothing.
    """

    items: Mapping[int, Seen]
    random: bool = False

    def differing(self, other: Content) -> list[int]:
        """Lists the ids of items that both have, and that are not alike."""
        return [index for index, seen in self.items.items() if not seen.is_like(other.items.get(index, seen))]

    def rounded(self, other: Content) -> list[int]:
        """Lists the ids of items that both have, and that are alike and not equal."""
        both = ((index, seen, other.items.get(index, seen)) for index, seen in self.items.items())
        return [index for index, seen, its in both if seen.is_like(its) and seen.digest != its.digest]

    def state_dict(self) -> dict[str, Any]:
        items = [[index, seen.shown, seen.digest] for index, seen in self.items.items()]
        return {"items": items, "values": [seen.values for seen in self.items.values()], "random": self.random}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Content:
        pairs = zip(state["items"], state["values"], strict=True)
        return cls({index: Seen(shown, digest, values) for (index, shown, digest), values in pairs}, state["random"])


def sampled_ids(rows: int, seed: int) -> list[int]:
    """Returns the ids to read of a dataset: its first, middle and last one, and others drawn by the seed."""
    drawn = Permutation(rows, derive_key("content", seed))(np.arange(min(rows, ITEMS))).tolist()
    return list(islice(dict.fromkeys([0, rows // 2, rows - 1, *drawn]), ITEMS))


def read_content(split: ImageArrays | Dataset[Any], seed: int, collate: Collate | None = None) -> Content:
    """Reads items of a split; of a stream the first one."""
    ids = [0] if isinstance(split, IterableDataset) else sampled_ids(rows_in(split), seed)
    end = time.monotonic() + SECONDS
    found: dict[int, Seen] = {}
    for index in ids:
        found[index] = _seen(split, index, collate)
        if time.monotonic() > end:
            break
    return Content(found)


def is_random(split: ImageArrays | Dataset[Any], ids: Iterable[int], collate: Collate | None = None) -> bool:
    """Reads items of a split twice, three at most, and tells whether one is not the same both times."""
    return any(_seen(split, index, collate).digest != _seen(split, index, collate).digest for index in islice(ids, 3))


def _seen(split: ImageArrays | Dataset[Any], index: int, collate: Collate | None) -> Seen:
    """Reads an item. All that cannot be read are alike: training tells of them when it comes there."""
    seed_everything(derive_key("content", index))  # an item that draws from the global generators is the same, too
    try:
        if isinstance(split, OfFiles):
            content = split.file_content(index)
            name = escaped("/".join(split.path(index).parts[-2:]))
            return Seen(f"{name} of {len(content):,} bytes", hashlib.sha256(content).hexdigest())
        if isinstance(split, ImageArrays):
            return _described(Item(index, split.images[index], split.targets[index]), rounds=False)
        return _described(_item(split, index, collate))
    except DistTrainError as error:
        return Seen(f"not readable ({error.message})", "")


def _item(split: Dataset[Any], index: int, collate: Collate | None) -> Item:
    with reading(f"item {index} of {name_of(split)}"):
        given = next(iter(split)) if isinstance(split, IterableDataset) else split[index]
    item = item_of(index, given, split, raw=collate is not None)
    if collate is None:
        return item
    batch, failures = Stack(name_of(split), None, collate)([item])
    for failure in failures:
        failure.throw()
    inputs, targets = (map_leaves(lambda leaf: leaf[0], tree) for tree in (batch.inputs, batch.targets))
    return Item(index, inputs, targets)


def _described(item: Item, rounds: bool = True) -> Seen:
    inputs, targets = named_leaves(item.input, ""), named_leaves(item.target, "")
    shown, values = list[str](), b""
    for name, leaf in inputs:
        text = f"{name} {short(leaf.dtype)} {list(leaf.shape)}".lstrip()
        # Integers of a tree are ids: no rounding makes others of them. Pixels are of a decoder.
        exact = not leaf.is_floating_point() and leaf.dtype != torch.uint8
        shown.append(f"{text} hash {tensors_digest(leaf)[:8]}" if exact else text)
        values += b"" if exact else _some_values(leaf)
    for name, leaf in targets:
        exact, what = not leaf.is_floating_point(), f"target {name}".rstrip()
        if leaf.dim() or not exact:
            shown.append(f"{what} {short(leaf.dtype)} {list(leaf.shape)}")
            shown += [f"hash {tensors_digest(leaf)[:8]}"] if exact else []
        else:
            shown.append(f"{what} {leaf.item()}")
        values += b"" if exact else _some_values(leaf)
    digest = tensors_digest(*(leaf for _, leaf in (*inputs, *targets)))
    if not (isinstance(item.input, Tensor) and isinstance(item.target, Tensor)):
        digest = hashlib.sha256(f"{digest} {shown}".encode()).hexdigest()  # with the leaves' names
    return Seen(", ".join(shown), digest, values if rounds else b"")


def tensors_digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        array = np.ascontiguousarray(tensor.cpu().numpy())
        digest.update(f"{array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _some_values(tensor: Tensor) -> bytes:
    flat = tensor.cpu().reshape(-1)
    if not len(flat):
        return np.zeros(_VALUES, np.float32).tobytes()
    places = torch.linspace(0, len(flat) - 1, _VALUES, dtype=torch.float64).long()
    return torch.nan_to_num(flat[places].float()).numpy().tobytes()
