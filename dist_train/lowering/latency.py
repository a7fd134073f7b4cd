"""Latency of models: medians, measured side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

_WARM_UP = 2
_AT_LEAST = 5


def compare_latency(
    calls: Mapping[str, Callable[[Tensor], Tensor]],
    make_input: Callable[[int], Tensor],
    batch_sizes: Sequence[int] = (1, 32),
    seconds: float = 0.5,
) -> dict[str, dict[str, float]]:
    """Measures the median milliseconds per call, as {name: {"1": ms, "32": ms}}.

    The calls take turns, so that other load of the machine affects all of them alike. Compare times of one result only:
    absolute times are not stable.

    Args:
        calls: by name.
        make_input: batch size to float32 [B, C, H, W].
        batch_sizes: to measure.
        seconds: budget per call and batch size, after 2 warm-up calls. At least 5 calls are made, however long they
            take.
    """
    result: dict[str, dict[str, float]] = {name: {} for name in calls}
    for batch_size in batch_sizes:
        images = make_input(batch_size)
        for call in calls.values():
            for _ in range(_WARM_UP):
                call(images)
        times: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + seconds * len(calls)
        rounds = 0
        while rounds < _AT_LEAST or time.perf_counter() < end:
            for name, call in calls.items():
                start = time.perf_counter()
                call(images)
                times[name].append(time.perf_counter() - start)
            rounds += 1
        for name, measured in times.items():
            result[name][str(batch_size)] = statistics.median(measured) * 1000
    return result


def measure_latency(
    call: Callable[[Tensor], Tensor],
    make_input: Callable[[int], Tensor],
    batch_sizes: Sequence[int] = (1, 32),
    seconds: float = 0.5,
) -> dict[str, float]:
    """Measures the median milliseconds per call, as {"1": ms, "32": ms}. Arguments as of `compare_latency`."""
    return compare_latency({"call": call}, make_input, batch_sizes, seconds)["call"]
