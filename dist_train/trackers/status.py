"""Keeps status.json as a run goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dist_train.run_dir.files import replace_json
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.status import _SECONDS, _saved_step
from dist_train.trackers.base import Tracker


class Status(Tracker):
    """Keeps status.json; as a tracker it follows the steps, at most every other second."""

    def __init__(self, run_dir: RunDir, run_name: str, attempt: int) -> None:
        super().__init__(run_dir, run_name, attempt)
        self._fields: dict[str, Any] = {
            "state": "running",
            "stage": None,
            "step": 0,
            "restarts": attempt,
            "error": None,
        }
        self._written = 0.0

    def set(self, **fields: Any) -> None:
        self._fields |= fields
        self._written = time.monotonic()
        replace_json(self.run_dir.status, self._fields)

    def preempted(self) -> None:
        """The attempt ended as it was asked to; what was saved of it is what counts."""
        self.set(state="preempted", step=_saved_step(self.run_dir, self._fields))

    def log(self, stage: str, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        self._fields |= {"stage": stage, "step": step}
        if time.monotonic() - self._written >= _SECONDS:
            self.set()
