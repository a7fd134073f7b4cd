"""Which checkpoints within a stage are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from dist_train.config.tree import KeepConfig


class Retention:
    """The newest, the best evaluated, and one for each `every_hours` of wall clock; what must be kept is kept anyway.

    The hours count from the stage's first checkpoint, or from the last one that was kept for them, also across restarts: the record
    lies in each checkpoint.

    Args:
        clock: seconds of wall clock.
    """

    def __init__(self, keep: KeepConfig, clock: Callable[[], float] = time.time) -> None:
        self._keep = keep
        self._clock = clock
        self._stage = ""
        self._since = 0.0
        self._hourly: list[str] = []

    def note(self, stage: str, name: str) -> dict[str, Any]:
        """Decides whether the checkpoint `name`, about to be written, is one of those for the hours.

        Returns:
            the record to write into it.
        """
        now = self._clock()
        if stage != self._stage:
            self._stage, self._since, self._hourly = stage, now, []
        elif self._keep.every_hours is not None and now - self._since >= 3600 * self._keep.every_hours:
            self._since = now
            self._hourly.append(name)
        return {"stage": self._stage, "since": self._since, "hourly": list(self._hourly)}

    def restore(self, record: dict[str, Any]) -> None:
        """Goes on from the record in a checkpoint."""
        self._stage, self._since, self._hourly = record["stage"], record["since"], list(record["hourly"])

    def choose(self, by_age: Sequence[str], best_first: Sequence[str], needed: Collection[str]) -> set[str]:
        """Names to keep.

        Args:
            by_age: the checkpoints of the stage, the newest last.
            best_first: those that were evaluated, by `select_by`; some may be gone.
            needed: what the stage cannot do without.
        """
        return {*by_age[-self._keep.last :], *best_first[: self._keep.best], *self._hourly, *needed}
