"""Decides which checkpoints of a stage are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from dist_train.config.tree import KeepConfig


class Retention:
    """Keeps the newest, the best evaluated, and one per `every_hours` of wall clock, besides those a stage needs.

    The hours count from the stage's first checkpoint, or from the last one kept for the hours. They count across
    restarts: the record is part of each checkpoint. What an older checkpoint needs is kept as long as that one, so that
    a run can go back to it where the newest is damaged.

    Args:
        clock: seconds of wall clock.
    """

    def __init__(self, keep: KeepConfig, clock: Callable[[], float] = time.time) -> None:
        self._keep = keep
        self._clock = clock
        self._stage = ""
        self._since = 0.0
        self._hourly: list[str] = []
        self._needs: dict[str, str] = {}

    def note(self, stage: str, name: str, needed: str | None = None) -> dict[str, Any]:
        """Decides if the checkpoint `name`, about to be written, is kept for the hours.

        needed: checkpoint of the same stage without which it is of no use.

        Returns:
            the record to write into it.
        """
        now = self._clock()
        if stage != self._stage:
            self._stage, self._since, self._hourly, self._needs = stage, now, [], {}
        elif self._keep.every_hours is not None and now - self._since >= 3600 * self._keep.every_hours:
            self._since = now
            self._hourly.append(name)
        if needed is not None:
            self._needs[name] = needed
        return {"stage": self._stage, "since": self._since, "hourly": list(self._hourly), "needs": dict(self._needs)}

    def restore(self, record: dict[str, Any]) -> None:
        """Continues from the record in a checkpoint."""
        self._stage, self._since, self._hourly = record["stage"], record["since"], list(record["hourly"])
        self._needs = dict(record.get("needs", {}))  # absent from older checkpoints

    def choose(self, by_age: Sequence[str], best_first: Sequence[str], needed: Collection[str]) -> set[str]:
        """Names to keep.

        Args:
            by_age: the stage's checkpoints, the newest last.
            best_first: evaluated checkpoints in order of `select_by`; some may no longer exist.
            needed: checkpoints that the stage requires.
        """
        kept = {*by_age[-self._keep.last :], *best_first[: self._keep.best], *self._hourly, *needed}
        self._needs = {name: each for name, each in self._needs.items() if name in kept}
        return kept | set(self._needs.values())

    def at_end(self, by_age: Sequence[str]) -> set[str]:
        """Names to keep besides the stage's end: the newest, with what it needs, to go back to."""
        kept = set(by_age[-1:])
        return kept | {each for name, each in self._needs.items() if name in kept}
