"""Writes metrics.jsonl: one object per line, append-only across restarts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from dist_train.run_dir.files import LineFile
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.retry import is_momentary
from dist_train.trackers.base import Tracker

_PATIENCE_SECONDS = 600.0  # lines wait in memory for so long


class JsonLines(Tracker):
    def __init__(self, run_dir: RunDir, run_name: str, attempt: int) -> None:
        super().__init__(run_dir, run_name, attempt)
        self._file = LineFile(run_dir.metrics)
        self._failing_since: float | None = None

    def log(self, stage: str, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}  # JSON has no nan
        self._file.append(
            {
                "time": round(time.time(), 3),
                "stage": stage,
                "epoch": epoch,
                "step": step,
                "attempt": self.attempt,
                **finite,
            }
        )
        self._patiently(self._file.flush)

    def sync(self) -> None:
        self._patiently(self._file.sync)

    def close(self) -> None:
        self._file.close()

    def _patiently(self, write: Callable[[], None]) -> None:
        """Leaves the lines in memory while the disk fails for a moment.

        Raises:
            OSError: it fails for good, or for longer than `_PATIENCE_SECONDS`.
        """
        try:
            write()
        except OSError as error:
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            if not is_momentary(error) or now - self._failing_since > _PATIENCE_SECONDS:
                raise
        else:
            self._failing_since = None
