"""A tracker."""

from collections.abc import Mapping
from typing import Any

import dist_train


@dist_train.register_tracker("csv")
class CSV(dist_train.Tracker):
    """Writes a line (stage, step, name, value) per scalar to scalars.csv of the run directory."""

    def __init__(self, run_dir: Any, run_name: str, attempt: int) -> None:
        super().__init__(run_dir, run_name, attempt)
        self._file = (run_dir.path / "scalars.csv").open("a")

    def log(self, stage: str, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        self._file.writelines(f"{stage},{step},{name},{value}\n" for name, value in scalars.items())

    def close(self) -> None:
        self._file.close()
