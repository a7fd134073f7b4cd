"""Keeps status.json up to date while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dist_train.run_dir.files import replace_json
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.retry import retried, told
from dist_train.run_dir.status import saved_step
from dist_train.trackers.base import Tracker

_SECONDS = 2.0  # between two writes


class Status(Tracker):
    """Writes the run's state to status.json, and its step at most every other second."""

    def __init__(self, run_dir: RunDir, run_name: str, attempt: int, retry: float = 0.0) -> None:
        """retry: seconds that writing the end of the attempt is tried again, which launchers read."""
        super().__init__(run_dir, run_name, attempt)
        self._retry = retry
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
        told(self._write, self.run_dir.status)

    def end(self, state: str, **fields: Any) -> None:
        """Notes how the attempt ended.

        Raises:
            OSError: it cannot be written.
        """
        self._fields |= {"state": state, **fields}
        retried(self._write, self._retry, str(self.run_dir.status))

    def _write(self) -> None:
        replace_json(self.run_dir.status, self._fields)

    def preempted(self) -> None:
        """Notes that the attempt ended as it was asked to, at the step of the newest checkpoint."""
        self.end("preempted", step=saved_step(self.run_dir, self._fields))

    def log(self, stage: str, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        self._fields |= {"stage": stage, "step": step}
        if time.monotonic() - self._written >= _SECONDS:
            self.set()
