"""A clock for what chooses by times: it moves only when a test moves it, so that other load cannot turn the choice."""

from __future__ import annotations


class Clock:
    """Stands for the module `time` where that is read; each look at it takes a tenth of a millisecond."""

    def __init__(self) -> None:
        self._now = 0.0

    def perf_counter(self) -> float:
        self._now += 1e-4
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds
