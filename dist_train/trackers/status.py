"""Keeps status.json up to date while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dist_train.run_dir.files import replace_json
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.status import saved_step
from dist_train.trackers.base import Tracker

_SECONDS = 2.0  # between two writes


class Status(Tracker):
    """Writes the run's state to status.json, and its step at most every other second."""

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
        """Notes that the attempt ended as it was asked to, at the step of the newest checkpoint."""
        self.set(state="preempted", step=saved_step(self.run_dir, self._fields))

    def log(self, stage: str, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        self._fields |= {"stage": stage, "step": step}
        if time.monotonic() - self._written >= _SECONDS:
            self.set()
