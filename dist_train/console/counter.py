"""Counts work that is no training: a bar on a terminal, elsewhere a plain line at an interval."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from dist_train.errors import printable

_SECONDS = 10.0  # between two lines


class Counter:
    """Shows how many of a number of items are done.

    Args:
        title: what is done, as in "packing train".
        unit: of the items, in the plural.
        enabled: False for a process that is to be silent.
    """

    def __init__(self, title: str, unit: str, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._title, self._unit, self._enabled = title, unit, enabled
        self._stream = stream or sys.stdout
        self._bar: tqdm[Any] | None = None
        self._done = self._total = self._first = 0

    def begin(self, total: int, done: int) -> None:
        self._total, self._done, self._first = total, done, done
        self._start = self._last = time.monotonic()
        if self._enabled and self._stream.isatty() and done < total:
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=printable(self._title),
                unit=f" {self._unit}",
                file=self._stream,
                dynamic_ncols=True,
            )

    def count(self, items: int) -> None:
        """Adds items that are done."""
        self._done += items
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(items)
        elif self._enabled and (now - self._last >= _SECONDS or self._done == self._total):
            self._last = now
            rate = (self._done - self._first) / max(now - self._start, 1e-9)
            left = (self._total - self._done) / max(rate, 1e-9)
            text = f"{self._title}: {self._done:,} of {self._total:,} {self._unit}  {rate:,.0f}/s  {left:.0f} s left"
            print(printable(text), file=self._stream, flush=True)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
