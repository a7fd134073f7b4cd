"""Stacks items to batches, in a worker process into shared memory; names the items that are not alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from dist_train.data import shared_memory
from dist_train.data.arrays import Batch
from dist_train.data.items import LEAVE_OUT, Failure, Item, item_of, name_of, reading, rows_in, short
from dist_train.errors import CorruptSampleError, DataError, first_line

_TRIED = 16  # items at the start of a dataset that may be corrupt before its first good one
CheckTargets = Callable[[Tensor], None]


class Stack:
    """Stacks items to batches; a DataLoader's collate_fn.

    Args:
        name: of the dataset.
        check_targets: raises DataError for targets [N, ...] that do not suit the task.
    """

    def __init__(self, name: str, check_targets: CheckTargets | None = None) -> None:
        self._name = name
        self._check_targets = check_targets

    def __call__(self, items: Sequence[Item | Failure]) -> tuple[Batch, list[Failure]]:
        """Stacks the items; returns the failures of the others, or one that concerns the whole batch."""
        failures = [item for item in items if isinstance(item, Failure)]
        missing = tuple(place for place, item in enumerate(items) if isinstance(item, Failure))
        found = [item for item in items if isinstance(item, Item)]
        nothing = torch.empty(0)
        if not found:
            return Batch(nothing.long(), nothing, nothing.long(), missing), failures
        try:
            self._require_alike("inputs", [item.input for item in found], found)
            self._require_alike("targets", [item.target for item in found], found)
            self._require_targets(found)
            return self._stacked(found, missing), failures
        except DataError as error:
            return Batch(nothing.long(), nothing, nothing.long(), missing), [*failures, Failure(error)]

    def _stacked(self, found: list[Item], missing: tuple[int, ...]) -> Batch:
        dtype = found[0].target.dtype
        for item in found:
            dtype = torch.promote_types(dtype, item.target.dtype)
        ids, targets = torch.tensor([item.id for item in found]), torch.stack([item.target.to(dtype) for item in found])
        if get_worker_info() is None:
            return Batch(ids, torch.stack([item.input for item in found]), targets, missing)
        try:
            # In a worker, default_collate stacks into shared memory. The others are moved there now: left to the
            # worker's queue, an error would lose the batch, and the rank would wait for it for ever.
            inputs = default_collate([item.input for item in found])
            return Batch(ids.share_memory_(), inputs.share_memory_(), targets.share_memory_(), missing)
        except (RuntimeError, OSError) as error:
            size = sum(item.input.nbytes for item in found)
            raise no_shared_memory(error, f"a batch of {len(found)} items of {self._name}", size) from error

    def _require_alike(self, what: str, tensors: list[Tensor], items: list[Item]) -> None:
        """Raises DataError where shapes differ, or inputs of two dtypes would be mixed; names two items."""
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if len(set(shapes)) > 1:
            hint = "give the targets of all items one shape"
            if what == "inputs":
                hint = "give all items one shape, for example by torchvision.transforms.v2.Resize((height, width))"
                if len({shape[1:] for shape in shapes}) == 1 and {shape[0] for shape in shapes} <= {1, 3, 4}:
                    hint = 'give all images the same channels, for example by image.convert("RGB")'
            raise self._unlike(what, "shapes", [str(list(shape)) for shape in shapes], items, hint)
        dtypes = [short(tensor.dtype) for tensor in tensors]
        if what == "inputs" and len(set(dtypes)) > 1:
            hint = "give all items one dtype: uint8 images, which are normalized here, or finished floats"
            raise self._unlike(what, "dtypes", dtypes, items, hint)

    def _unlike(self, what: str, kind: str, values: list[str], items: list[Item], hint: str) -> DataError:
        usual = Counter(values).most_common(1)[0][0]
        odd = next(place for place, value in enumerate(values) if value != usual)
        pair = sorted((odd, values.index(usual)), key=lambda place: items[place].id)
        ids, said = (" and ".join(str(part) for part in parts) for parts in _unzipped(pair, values, items))
        return DataError(f"items {ids} of {self._name} are not alike: their {what} have {kind} {said}", hint)

    def _require_targets(self, items: list[Item]) -> None:
        """Checks the batch's targets at once, and names the first item that does not suit."""
        if self._check_targets is None:
            return
        try:
            self._check(torch.stack([item.target for item in items]))
        except DataError as whole:
            for item in items:
                try:
                    self._check(item.target[None])
                except DataError as error:
                    raise DataError(f"item {item.id} of {self._name}: {error.message}", error.hint) from error.__cause__
            raise DataError(f"items of {self._name}: {whole.message}", whole.hint) from whole.__cause__

    def _check(self, targets: Tensor) -> None:
        assert self._check_targets is not None
        with reading("check_targets of the task"):
            self._check_targets(targets)


def _unzipped(places: list[int], values: list[str], items: list[Item]) -> tuple[list[int], list[str]]:
    return [items[place].id for place in places], [values[place] for place in places]


def no_shared_memory(error: BaseException, what: str, size: int) -> DataError:
    """Makes the error of a worker that cannot hand over `what`, of `size` bytes."""
    if "Too many open files" in first_line(error):
        return too_many_files(error)
    return DataError(
        f"{what} ({shared_memory.mebibytes(size)}) does not fit into shared memory, through which worker processes "
        f"hand over batches ({shared_memory.described()}): {first_line(error)}",
        shared_memory.HINT,
    )


def too_many_files(error: BaseException) -> DataError:
    """Makes the error for batches of worker processes that need more open files than are allowed."""
    return DataError(
        f"worker processes cannot hand over their batches, as too many files are open: {first_line(error)}",
        "ulimit -n 65536, and close files in __getitem__; or --data.workers 0",
    )


def first_batch(dataset: Dataset[Any], check_targets: CheckTargets | None = None) -> Batch | None:
    """Reads the first item as a batch of one, at set-up. Leaves out items that cannot be decoded.

    Returns:
        None where none of the first items can be decoded.

    Raises:
        DataError: the item cannot be read, or does not suit; names dataset and item.
    """
    name = name_of(dataset)
    for index in range(min(_TRIED, 1 if isinstance(dataset, IterableDataset) else rows_in(dataset))):
        try:
            with reading(f"item {index} of {name}", LEAVE_OUT):
                given = next(iter(dataset)) if isinstance(dataset, IterableDataset) else dataset[index]
        except CorruptSampleError:
            continue
        batch, failures = Stack(name, check_targets)([item_of(index, given, dataset)])
        for failure in failures:
            failure.throw()
        return batch
    return None
