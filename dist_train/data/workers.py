"""Worker processes: make items as functions of (seed, epoch, id); their ends are named."""

from __future__ import annotations

import errno
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch.utils.data import Dataset
from torch.utils.data._utils.signal_handling import _error_if_any_worker_fails
from torch.utils.data.dataloader import _BaseDataLoaderIter

from dist_train.data import shared_memory
from dist_train.data.batch_memory import new_rows
from dist_train.data.items import LEAVE_OUT, Failure, Item, item_of, name_of, reading, rows_in
from dist_train.data.permutation import derive_key
from dist_train.data.seeding import seed_everything as seed_everything
from dist_train.data.stack import no_shared_memory, too_many_files
from dist_train.distributed.watchdog.stop_signals import starting_workers
from dist_train.errors import DataError, DistTrainError, first_line

EVALUATION = -1  # in place of an epoch
T = TypeVar("T")


@runtime_checkable
class Augmenting(Protocol):
    """A map-style dataset that augments its items itself; `__getitem__` gives them without augmentation."""

    own_steps: int
    """Number of leading steps of data.augment that it applies; the others work on batches on the device."""

    def augmented(self, index: int, seed: int) -> tuple[torch.Tensor, Any]:
        """Returns item `index`, augmented as a function of `seed` (0 .. 2^64 - 1) alone; the same in any process."""


@runtime_checkable
class Filling(Protocol):
    """A map-style dataset of uint8 inputs of one shape, which writes them to their places in a batch.

    So they lie in shared memory as soon as they are made. Its targets are integers.
    """

    input_shape: tuple[int, ...]

    def fill_input(self, index: int, seed: int | None, out: torch.Tensor) -> int:
        """Writes an item's input to `out`, augmented as a function of `seed` (None: not), and returns its target."""


class Keys:
    """A DataLoader's batch_sampler: yields lists of (epoch, id), so that workers outlive an epoch."""

    def __init__(self) -> None:
        self._lists: Iterator[list[tuple[int, int]]] = iter(())

    def set(self, epoch: int, rows: Iterator[np.ndarray]) -> None:
        self._lists = ([(epoch, index) for index in ids.tolist()] for ids in rows)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._lists


class Keyed(Dataset[Any]):
    """A map-style dataset whose items depend on (seed, epoch, id) alone, not on the worker.

    A key's id is an index of the dataset, or that + turn * rows: the same item, augmented in another way.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, channels_last: bool = False, raw: bool = False) -> None:
        """raw: items are left as the dataset gives them, for a `collate`."""
        self._dataset = dataset
        self._raw = raw
        self._rows = rows_in(dataset)
        self._seed = seed
        self._channels_last = channels_last
        self._name = name_of(dataset)
        # Asked once: it takes longer than a crop.
        self._filling = dataset if isinstance(dataset, Filling) and not raw else None

    def __getitem__(self, key: tuple[int, int]) -> Item | Failure:
        epoch, drawn = key
        index = drawn % self._rows
        try:
            with reading(f"item {index} of {self._name}", LEAVE_OUT):
                given = self._item(index, epoch, derive_key("item", self._seed, epoch, drawn))
            return item_of(index, given, self._dataset, self._raw, epoch)
        except DistTrainError as error:
            return Failure(error)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Item | Failure]:
        """Returns the items of a batch; a DataLoader asks for them so."""
        dataset = self._filling
        if dataset is None:
            return [self[key] for key in keys]
        shape = dataset.input_shape
        try:
            batch = new_rows(len(keys), shape, self._channels_last)
        except (RuntimeError, OSError) as error:
            what = f"a batch of {len(keys)} items of {self._name}"
            return [Failure(no_shared_memory(error, what, len(keys) * prod(shape)))] * len(keys)
        return [self._filled(dataset, *key, batch, row) for key, row in zip(keys, batch.unbind(), strict=True)]

    def _filled(
        self, dataset: Filling, epoch: int, drawn: int, batch: torch.Tensor, row: torch.Tensor
    ) -> Item | Failure:
        index = drawn % self._rows
        seed = None if epoch == EVALUATION else derive_key("item", self._seed, epoch, drawn)
        try:
            with reading(f"item {index} of {self._name}", LEAVE_OUT):
                return Item(index, row, torch.tensor(dataset.fill_input(index, seed, row)), batch)
        except DistTrainError as error:
            return Failure(error)

    def _item(self, index: int, epoch: int, seed: int) -> Any:
        if isinstance(self._dataset, Augmenting):
            return self._dataset[index] if epoch == EVALUATION else self._dataset.augmented(index, seed)
        seed_everything(seed)
        return self._dataset[index]


_END_SECONDS = 10.0  # between the end of a worker's connection and that of its process, at most


def received(start: Callable[[], Iterator[T]]) -> Iterator[T]:
    """Yields the batches of worker processes, which `start` starts.

    Raises:
        DataError: the processes cannot be started, or one of them ended.
    """
    fetched: Iterator[T] = iter(())
    try:
        with _ends_told():
            fetched = _started(start)
        while True:
            with _ends_told():
                batch = next(fetched, None)
            if batch is None:
                return
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        text = first_line(error)
        if "ancdata" in text or "Too many open files" in text:
            raise too_many_files(error) from error
        # The others come where one is killed while it hands over a batch.
        if not text.startswith("DataLoader worker") and not isinstance(error, (EOFError, ConnectionError)):
            raise
        raise _ended(_ends_of(fetched) or text) from error


def _started(start: Callable[[], Iterator[T]]) -> Iterator[T]:
    try:
        with starting_workers():
            try:
                return start()
            except (RuntimeError, EOFError, ConnectionError) as error:
                ends = _ends_of(_iterator_of(error))  # now, as the other workers are killed next
                if ends:
                    raise _ended(ends) from error
                raise
    except OSError as error:
        _close(error)
        if error.errno == errno.EMFILE:
            raise too_many_files(error) from error
        message = f"worker processes cannot be started: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.ENOENT, errno.ENOSYS, errno.EACCES):  # of their semaphores
            message = f"{message}, in shared memory ({shared_memory.described()})"
            raise DataError(message, shared_memory.HINT) from error
        raise DataError(message, "--data.workers 0, or a lower number") from error


def _close(error: BaseException) -> None:
    """Closes torch's iterator that raised the error while it was made: its own end would fail on what it lacks."""
    iterator = _iterator_of(error)
    if iterator is not None:
        setattr(iterator, "_shutdown", True)  # noqa: B010 (torch's own does not declare it)


def _iterator_of(error: BaseException) -> _BaseDataLoaderIter | None:
    """Returns torch's iterator in whose code an error was raised."""
    found = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((each for each in found if isinstance(each, _BaseDataLoaderIter)), None)


@contextmanager
def _ends_told() -> Iterator[None]:
    """Raises torch's error at once where a worker process ends in the body, or has ended before.

    torch's own handler of SIGCHLD raises it wherever the rank is at that moment: in a tracker, or in the user's loss.
    """
    if threading.current_thread() is not threading.main_thread():  # where torch finds it within 5 s
        yield
        return
    earlier = signal.getsignal(signal.SIGCHLD)

    def on_end(number: int, frame: FrameType | None) -> None:
        _error_if_any_worker_fails()
        if callable(earlier):
            earlier(number, frame)

    signal.signal(signal.SIGCHLD, on_end)
    try:
        _error_if_any_worker_fails()
        yield
    finally:
        signal.signal(signal.SIGCHLD, earlier)


def _ends_of(fetched: object) -> str:
    """Returns "process 7 was killed by SIGKILL" for each worker that has ended; torch forgets them."""
    workers, said = getattr(fetched, "_workers", ()), []
    if workers:  # the end of a worker's connection may be seen before its own, which takes long on a busy machine
        ready = wait([worker.sentinel for worker in workers], timeout=_END_SECONDS)
        for worker in workers:
            if worker.sentinel in ready:  # its files are closed, and its code is not there yet
                worker.join(_END_SECONDS)
    with suppress(RuntimeError):  # else it would be told to the next reader
        _error_if_any_worker_fails()
    for worker in workers:
        code = worker.exitcode
        if code is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            said.append(f"process {worker.pid} {how}")
    return ", ".join(said)


def _ended(text: str) -> DataError:
    message = f"a worker process that reads the data ended: {text}"
    if "Bus error" in text or "SIGBUS" in text:
        return DataError(f"{message} ({shared_memory.described()})", shared_memory.HINT)
    return DataError(message, "if memory ran out, use fewer: --data.workers 1; 0 reads in the rank's own process")
