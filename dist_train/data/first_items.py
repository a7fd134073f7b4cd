"""Reads a dataset's first items at set-up: to check them, and as the example on which models are tried."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from dist_train.data.arrays import Batch, ImageArrays
from dist_train.data.augment.normalize import Normalization
from dist_train.data.items import LEAVE_OUT, Item, item_of, name_of, reading, rows_in
from dist_train.data.permutation import derive_key
from dist_train.data.seeding import seeded
from dist_train.data.stack import CheckTargets, Collate, Stack
from dist_train.errors import CorruptSampleError, DataError
from dist_train.trees import Tree, map_leaves, named_leaves, rows_of, take

_TRIED = 16  # items at the start of a dataset that may be corrupt before its first good one
_COMPARED = 4  # items on which a `collate` is tried
_DRAWS = 8  # seeds with which one that seems to move rows is tried, to tell what it draws
_TRIED_FOR_EXAMPLE = 256  # the same, of the example, without which no model can be tried


def first_batch(
    dataset: Dataset[Any],
    check_targets: CheckTargets | None = None,
    further: Sequence[int] = (),
    collate: Collate | None = None,
) -> Batch | None:
    """Reads the first item as a batch of one, at set-up. Leaves out items that cannot be decoded.

    Args:
        further: items of a map-style dataset that are read too, and must be like the first.

    Returns:
        None where none of the first items can be decoded.

    Raises:
        DataError: an item cannot be read, or does not suit; names dataset and item.
    """
    found = list(islice(_decoded(dataset, _TRIED, collate is not None), 1))
    for index in further if found else ():
        found += _read(dataset, index, collate is not None) if index > found[0].id else []
    return _stacked(dataset, found, check_targets, collate) if found else None


def example_rows(
    split: ImageArrays | Dataset[Any], rows: int, normalize: Normalization, collate: Collate | None = None
) -> Tree:
    """Returns inputs of the first items that can be decoded, normalized and not augmented, [rows, ...] on the CPU.

    Where there are fewer, they are repeated. The global generators go on as if nothing had been read.

    Raises:
        DataError: none of the first items can be decoded, or one cannot be read.
    """
    if isinstance(split, ImageArrays):
        inputs: Tree = split.images[:rows]
    else:
        with seeded(derive_key("example", 0)):
            found = list(islice(_decoded(split, _TRIED_FOR_EXAMPLE + rows, collate is not None), rows))
            if not found:
                raise DataError(
                    f"none of the first items of {name_of(split)} can be decoded",
                    "check the files and the disk; --data.on_corrupt error names the first bad file",
                )
            found = [found[row % len(found)] for row in range(rows)]
            inputs = _stacked(split, found, None, collate).inputs
    if rows_of(inputs) < rows:
        inputs = take(inputs, [row % rows_of(inputs) for row in range(rows)])
    return map_leaves(lambda leaf: normalize(leaf) if leaf.dtype == torch.uint8 else leaf.clone(), inputs)


def require_order(dataset: Dataset[Any], collate: Collate) -> None:
    """Refuses a `collate` that gives rows of a batch in another order than its items, as sorted by their lengths.

    It is tried on the first items, in both orders, against batches of each item alone. Rows are compared by leaf where
    they have one shape. Leaves that it draws, as of labels that it mixes, tell nothing.

    Raises:
        DataError: a row is another item's.
    """
    with seeded(derive_key("order", 0)):
        found = list(islice(_decoded(dataset, _TRIED, True), _COMPARED))
        if len(found) < 2:
            return
        # Each twice, as no training batch has one row alone.
        alone = [_collated(dataset, [item, item], collate) for item in found]
        for order in (list(range(len(found))), list(reversed(range(len(found))))):
            items = [found[place] for place in order]
            made = _collated(dataset, items, collate)
            moved = {name: at for name, leaf in made.items() if (at := _moved(name, leaf, order, alone)) is not None}
            for seed in range(1, _DRAWS if moved else 1):
                again = _collated(dataset, items, collate, seed)
                moved = {name: at for name, at in moved.items() if torch.equal(made[name], again[name])}
            for name, (row, other) in moved.items():
                kept = [each for each in made if each not in moved]
                also = f", while {', '.join(kept[:3])} keep the order" if kept else ""
                raise DataError(
                    f"collate of {name_of(dataset)} changes the order of rows: of items "
                    f"{', '.join(str(item.id) for item in items)}, row {row} of {name} is that of item "
                    f"{found[other].id}{also}",
                    "keep the items' order in collate; pack_padded_sequence takes it with enforce_sorted=False; "
                    "pairs of different items, as negatives, are for the model or the task to make",
                )


def _collated(dataset: Dataset[Any], items: list[Item], collate: Collate, seed: int = 0) -> dict[str, Tensor]:
    """Returns the leaves of a batch. Of copies, as a collate may change its items, which it gets once in training."""
    batch = _stacked(dataset, [_copied(item) for item in items], None, collate, seed)
    return dict([*named_leaves(batch.inputs, "inputs"), *named_leaves(batch.targets, "targets")])


def _copied(item: Item) -> Item:
    try:
        return copy.deepcopy(item)
    except Exception:  # other people's objects; most collates change none
        return item


def _moved(name: str, leaf: Tensor, order: list[int], alone: list[dict[str, Tensor]]) -> tuple[int, int] | None:
    """Returns a row of a batch's leaf that is not its own item's, and the place of the item whose it is.

    Where that item has kept its row, the two are but alike, as masks that are cut to the shortest.
    """
    rows = [each[name][0] if name in each else None for each in alone]
    like = [[row is not None and torch.equal(made, row) for row in rows] for made in leaf]
    kept = [like[order.index(item)][item] for item in range(len(order))]
    for place, (own, found) in enumerate(zip(order, like, strict=True)):
        others = [item for item, same in enumerate(found) if same and not kept[item]]
        if not found[own] and others:
            return place, others[0]
    return None


def _stacked(
    dataset: Dataset[Any],
    found: list[Item],
    check_targets: CheckTargets | None,
    collate: Collate | None,
    seed: int = 0,
) -> Batch:
    batch, failures = Stack(name_of(dataset), check_targets, collate, seed)(found)
    for failure in failures:
        failure.throw()
    return batch


def _decoded(dataset: Dataset[Any], tried: int, raw: bool) -> Iterator[Item]:
    """Yields those of the first `tried` items that can be decoded."""
    if isinstance(dataset, IterableDataset):
        yield from _of_stream(dataset, tried, raw)
        return
    for index in range(min(tried, rows_in(dataset))):
        yield from _read(dataset, index, raw)


def _read(dataset: Dataset[Any], index: int, raw: bool) -> list[Item]:
    """Returns the item; none where it cannot be decoded."""
    try:
        with reading(f"item {index} of {name_of(dataset)}", LEAVE_OUT):
            given = dataset[index]
    except CorruptSampleError:
        return []
    return [item_of(index, given, dataset, raw)]


def _of_stream(dataset: IterableDataset[Any], tried: int, raw: bool) -> Iterator[Item]:
    name, end = name_of(dataset), object()
    with reading(f"the stream of {name}"):
        stream = iter(dataset)
    for place in range(tried):
        try:
            with reading(f"item {place} of {name}", LEAVE_OUT):
                given = next(stream, end)
        except CorruptSampleError:
            return  # a generator ends with its error
        if given is end:
            if place == 0:
                raise DataError(f"the stream of {name} has no items", "let __iter__ yield pairs (input, target)")
            return
        yield item_of(place, given, dataset, raw)
