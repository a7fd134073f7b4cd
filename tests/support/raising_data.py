"""Datasets that raise every kind of error, at every place: --import tests.support.raising_data."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import PIL
import torch
from torch.utils.data import Dataset, IterableDataset

import dist_train

ROWS = 24
PLANTED_AT = 13


class TwoArguments(Exception):
    """Cannot be made again from its text, as a DataLoader does."""

    def __init__(self, file: str, place: int) -> None:
        super().__init__(f"{file} is damaged at {place}")


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise pickle.PicklingError("never sent")


class Own(BaseException):
    pass


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("says nothing")


def _by_torch() -> None:
    torch.zeros(2, 3) @ torch.zeros(2, 3)


def _raiser(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


KINDS: dict[str, Callable[[], None]] = {
    "ValueError: planted": _raiser(ValueError("planted")),
    "KeyError: 'planted'": _raiser(KeyError("planted")),
    "OSError: [Errno 5] planted": _raiser(OSError(5, "planted")),
    "UnidentifiedImageError: planted": _raiser(PIL.UnidentifiedImageError("planted")),
    "RuntimeError: mat1 and mat2 shapes cannot be multiplied": _by_torch,
    "MemoryError": _raiser(MemoryError()),
    "StopIteration": _raiser(StopIteration()),
    "SystemExit: 3": _raiser(SystemExit(3)),
    "SystemExit: 0": _raiser(SystemExit(0)),
    "Own: planted": _raiser(Own("planted")),
    "AssertionError": _raiser(AssertionError()),
    "TwoArguments: cat.png is damaged at 7": _raiser(TwoArguments("cat.png", 7)),
    "Unpicklable: planted": _raiser(Unpicklable("planted")),
    "Mute": _raiser(Mute()),
}
"""Maps what an error's message must say to what raises it."""


class Rows(Dataset[Any]):
    """A row is its number; raises by `fail` at one place."""

    def __init__(self, place: str = "", fail: Callable[[], None] = lambda: None) -> None:
        self._place, self._fail = place, fail
        if place == "init":
            fail()

    def __len__(self) -> int:
        if self._place == "len":
            self._fail()
        return ROWS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self._place == "item" and index == PLANTED_AT:
            self._fail()
        return torch.full((1, 4, 4), index / ROWS), index % 2


class Stream(IterableDataset[Any]):
    def __init__(self, place: str, fail: Callable[[], None]) -> None:
        self._place, self._fail = place, fail
        self.input_shape = (1, 4, 4)

    def __iter__(self) -> Iterator[Any]:
        if self._place == "iter":
            self._fail()
        return self._items()

    def _items(self) -> Iterator[Any]:
        for index in range(ROWS):
            if self._place == "next" and index == PLANTED_AT:
                self._fail()
            yield torch.full((1, 4, 4), index / ROWS), index % 2


@dist_train.register_dataset("raising")
def raising(data: dist_train.DataConfig) -> Any:
    place, fail = data.args["place"], KINDS[data.args.get("kind", "ValueError: planted")]
    if place == "function":
        fail()
    if place == "no splits":
        return Rows()
    if place in ("iter", "next"):
        return dist_train.Splits(Stream(place, fail), Rows(), 2, steps_per_epoch=3)
    return dist_train.Splits(Rows(place, fail), Rows(), 2)
