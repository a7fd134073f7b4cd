"""Latency and throughput of models, measured side by side in one run: medians, and how far they spread."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dist_train import trees
from dist_train.trees import Tree

_WARM_UP = 2
_AT_LEAST = 5
_TURN = 0.1  # seconds of requests in each turn: less, and the start and the end of a queue count
_MOST_REQUESTS = 2048


@dataclass(frozen=True)
class Spread:
    """Median of some measurements, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Takes two values or more."""
        low, median, high = statistics.quantiles(values, method="inclusive")
        return cls(median, low, high)


class Requests(Protocol):
    """A model that answers many batches, perhaps several at once."""

    def __call__(self, batches: Sequence[Tree]) -> list[Tree]:
        """Returns the outputs of the batches, in their order."""

    def at_once(self, rows: int) -> int:
        """Returns the number of batches of so many rows that are computed at once."""


@dataclass(frozen=True)
class OneByOne:
    """Answers one batch after the other."""

    call: Callable[[Tree], Tree]

    def __call__(self, batches: Sequence[Tree]) -> list[Tree]:
        return [self.call(batch) for batch in batches]

    def at_once(self, rows: int) -> int:
        return 1


def _turns(names: Sequence[str], seconds: float) -> Iterator[str]:
    """Yields the names in turns, so that other load of the machine affects all of them alike: five rounds at least."""
    end, rounds = time.perf_counter() + seconds * len(names), 0
    while rounds < _AT_LEAST or time.perf_counter() < end:
        yield from names
        rounds += 1


def compare_spread(
    calls: Mapping[str, Callable[[Tree], Tree]],
    make_input: Callable[[int], Tree],
    batch_sizes: Sequence[int] = (1, 32),
    seconds: float = 0.5,
    untimed: int = 0,
) -> dict[str, dict[str, Spread]]:
    """Measures the milliseconds per call, as {name: {"1": spread, "32": spread}}. Arguments as of `compare_latency`.

    untimed: calls at the beginning of each turn, so that caches and threads are this runtime's own, not the one's
        before. They count in the budget.
    """
    result: dict[str, dict[str, Spread]] = {name: {} for name in calls}
    for batch_size in batch_sizes:
        images = make_input(batch_size)
        for call in calls.values():
            for _ in range(_WARM_UP):
                call(images)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for name in _turns(list(calls), seconds):
            for _ in range(untimed):
                calls[name](images)
            start = time.perf_counter()
            calls[name](images)
            times[name].append((time.perf_counter() - start) * 1000)
        for name, measured in times.items():
            result[name][str(batch_size)] = Spread.of(measured)
    return result


def compare_latency(
    calls: Mapping[str, Callable[[Tree], Tree]],
    make_input: Callable[[int], Tree],
    batch_sizes: Sequence[int] = (1, 32),
    seconds: float = 0.5,
) -> dict[str, dict[str, float]]:
    """Measures the median milliseconds per call, as {name: {"1": ms, "32": ms}}.

    The calls take turns. Compare times of one result only: absolute times are not stable.

    Args:
        calls: by name.
        make_input: batch size to inputs [B, ...].
        batch_sizes: to measure.
        seconds: budget per call and batch size, after 2 warm-up calls. At least 5 calls are made, however long they
            take.
    """
    spreads = compare_spread(calls, make_input, batch_sizes, seconds)
    return {name: {size: spread.median for size, spread in each.items()} for name, each in spreads.items()}


def measure_latency(
    call: Callable[[Tree], Tree],
    make_input: Callable[[int], Tree],
    batch_sizes: Sequence[int] = (1, 32),
    seconds: float = 0.5,
) -> dict[str, float]:
    """Measures the median milliseconds per call, as {"1": ms, "32": ms}. Arguments as of `compare_latency`."""
    return compare_latency({"call": call}, make_input, batch_sizes, seconds)["call"]


def compare_throughput(
    models: Mapping[str, Requests],
    make_input: Callable[[int], Tree],
    batch_sizes: Sequence[int] = (1, 32),
    seconds: float = 0.5,
) -> dict[str, dict[str, Spread]]:
    """Measures samples per second, as {name: {"1": spread, "32": spread}}. Other arguments as of `compare_latency`.

    A turn is as many requests as take about 0.1 s, and at least four times as many as are computed at once: all are
    there from the beginning, as on a server under load.
    """
    result: dict[str, dict[str, Spread]] = {name: {} for name in models}
    for batch_size in batch_sizes:
        images = make_input(batch_size)
        counts = {name: _requests(model, images) for name, model in models.items()}
        rates: dict[str, list[float]] = {name: [] for name in models}
        for name in _turns(list(models), seconds):
            start = time.perf_counter()
            models[name]([images] * counts[name])
            rates[name].append(batch_size * counts[name] / (time.perf_counter() - start))
        for name, measured in rates.items():
            result[name][str(batch_size)] = Spread.of(measured)
    return result


def _requests(model: Requests, images: Tree) -> int:
    """Warms a model up, and returns the number of requests of a turn."""
    few = 4 * model.at_once(trees.rows_of(images))
    model([images] * few)
    start = time.perf_counter()
    model([images] * few)
    taken = time.perf_counter() - start
    return max(few, min(_MOST_REQUESTS, math.ceil(few * _TURN / max(taken, 1e-9))))
