"""Writes metrics.jsonl: one object per line, append-only across restarts."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from dist_train.run_dir.files import LineFile
from dist_train.run_dir.paths import RunDir
from dist_train.trackers.base import Tracker


class JsonLines(Tracker):
    def __init__(self, run_dir: RunDir, run_name: str, attempt: int) -> None:
        super().__init__(run_dir, run_name, attempt)
        self._file = LineFile(run_dir.metrics)

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
        self._file.flush()

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()
