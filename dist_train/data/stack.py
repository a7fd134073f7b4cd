"""Stacks items to batches, in a worker process into shared memory; or has the user's `collate` make them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from dist_train.data import shared_memory
from dist_train.data.alike import columns
from dist_train.data.arrays import Batch
from dist_train.data.items import Failure, Item, inputs_of, reading, targets_of
from dist_train.data.permutation import derive_key
from dist_train.data.seeding import seeded
from dist_train.errors import DataError, first_line
from dist_train.trees import Tree, leaves, map_leaves, named_leaves, rebuild, take

CheckTargets = Callable[[Tree], None]
Collate = Callable[[list[Any]], tuple[Any, Any]]
"""Makes (inputs, targets) of a batch from the items (input, target), as the dataset gives them."""
_SHOWN = 3  # ids that a message shows


class Stack:
    """Stacks items to batches; a DataLoader's collate_fn.

    Args:
        name: of the dataset.
        check_targets: raises DataError for targets [N, ...] that do not suit the task.
        collate: makes the batch from items as the dataset gives them, instead of stacking tensors of one shape.
        seed: of the numbers that `collate` draws from the global generators.
    """

    def __init__(
        self,
        name: str,
        check_targets: CheckTargets | None = None,
        collate: Collate | None = None,
        seed: int = 0,
    ) -> None:
        self._name = name
        self._check_targets = check_targets
        self._collate = collate
        self._seed = seed

    def __call__(self, items: Sequence[Item | Failure]) -> tuple[Batch, list[Failure]]:
        """Stacks the items; returns the failures of the others, or one that concerns the whole batch."""
        failures = [item for item in items if isinstance(item, Failure)]
        missing = tuple(place for place, item in enumerate(items) if isinstance(item, Failure))
        found = [item for item in items if isinstance(item, Item)]
        nothing = torch.empty(0)
        if not found:
            return Batch(nothing.long(), nothing, nothing.long(), missing), failures
        try:
            made = self._stacked if self._collate is None else self._collated
            return made(found, missing), failures
        except DataError as error:
            return Batch(nothing.long(), nothing, nothing.long(), missing), [*failures, Failure(error)]

    def _stacked(self, found: list[Item], missing: tuple[int, ...]) -> Batch:
        inputs = columns("inputs", [item.input for item in found], found, self._name)
        targets = columns("targets", [item.target for item in found], found, self._name)
        stacked = rebuild(found[0].target, (torch.stack(_of_one_dtype(column)) for column in targets))
        # Each item's target as it is: one of another dtype makes others of the stacked ones.
        self._require_targets(stacked, found, (map_leaves(lambda leaf: leaf[None], item.target) for item in found))
        filled = found[0].batch
        if filled is not None and missing:
            filled = filled[[place for place in range(len(filled)) if place not in missing]]
        # In a worker, default_collate stacks into shared memory.
        stack = torch.stack if get_worker_info() is None else default_collate

        def batch() -> Tree:
            return rebuild(found[0].input, map(stack, inputs)) if filled is None else filled

        size = sum(tensor.nbytes for column in inputs for tensor in column)
        return self._handed_over(found, batch, stacked, missing, size)

    def _collated(self, found: list[Item], missing: tuple[int, ...]) -> Batch:
        assert self._collate is not None
        ids = [item.id for item in found]
        names = ", ".join(map(str, ids[:_SHOWN])) + (" ..." if len(ids) > _SHOWN else "")
        what = f"the collated batch of items {names} of {self._name}"
        with (
            reading(f"collate, of items {names} of {self._name}", "correct Splits.collate"),
            # The numbers that it draws depend on the batch alone, and leave those of a stream as they are.
            seeded(derive_key("collate", self._seed, found[0].epoch, ids[0], len(ids))),
        ):
            given: object = self._collate([(item.input, item.target) for item in found])
        if not (isinstance(given, (tuple, list)) and len(given) == 2):
            message = f"{what} is a {type(given).__name__}, not a pair (inputs, targets)"
            raise DataError(message, "return (inputs, targets) from collate")
        inputs, targets = inputs_of(given[0], what), targets_of(given[1], what)
        for part, tree in (("inputs", inputs), ("targets", targets)):
            for name, leaf in named_leaves(tree, part):
                if leaf.shape[:1] != (len(found),):
                    raise DataError(
                        f"{name} of {what} has shape {list(leaf.shape)}, for {len(found)} items",
                        "give each leaf a row for each item, as its leading dimension",
                    )
        self._require_targets(targets, found, (take(targets, slice(row, row + 1)) for row in range(len(found))))
        return self._handed_over(found, lambda: inputs, targets, missing, sum(each.nbytes for each in leaves(inputs)))

    def _handed_over(
        self, found: list[Item], inputs: Callable[[], Tree], targets: Tree, missing: tuple[int, ...], size: int
    ) -> Batch:
        ids = torch.tensor([item.id for item in found])
        if get_worker_info() is None:
            return Batch(ids, inputs(), targets, missing)
        try:
            # Moved to shared memory now: left to the worker's queue, an error would lose the batch, and the rank would
            # wait for it for ever.
            ready, targets = (map_leaves(Tensor.share_memory_, tree) for tree in (inputs(), targets))
            return Batch(ids.share_memory_(), ready, targets, missing)
        except (RuntimeError, OSError) as error:
            raise no_shared_memory(error, f"a batch of {len(found)} items of {self._name}", size) from error

    def _require_targets(self, targets: Tree, items: list[Item], rows: Iterable[Tree]) -> None:
        """Checks the batch's targets at once, and names the first item that does not suit; `rows`: of each alone."""
        if self._check_targets is None:
            return
        try:
            self._check(targets)
        except DataError as whole:
            for row, item in zip(rows, items, strict=True):
                try:
                    self._check(row)
                except DataError as error:
                    raise DataError(f"item {item.id} of {self._name}: {error.message}", error.hint) from error.__cause__
            raise DataError(f"items of {self._name}: {whole.message}", whole.hint) from whole.__cause__

    def _check(self, targets: Tree) -> None:
        assert self._check_targets is not None
        with reading("check_targets of the task"):
            self._check_targets(targets)


def _of_one_dtype(tensors: list[Tensor]) -> list[Tensor]:
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


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
