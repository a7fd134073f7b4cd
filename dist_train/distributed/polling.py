"""Polls for a condition that another process brings about."""

from __future__ import annotations

import time
from collections.abc import Iterator

_FIRST_PAUSE = 0.001


def attempts(seconds: float, longest_pause: float = 0.2) -> Iterator[float]:
    """Yields the seconds that passed so far, at once and then after pauses, until more than `seconds` have passed.

    Pauses double from a millisecond to `longest_pause` seconds. Signal handlers run between them.
    """
    start, pause = time.monotonic(), min(_FIRST_PAUSE, longest_pause)
    while True:
        yield (waited := time.monotonic() - start)
        if waited > seconds:
            return
        time.sleep(pause)
        pause = min(pause * 2, longest_pause)
