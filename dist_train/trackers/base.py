"""What the loop asks of a tracker."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from dist_train.run_dir import RunDir


class Tracker(ABC):
    """Receives scalars on rank 0."""

    def __init__(self, run_dir: RunDir, run_name: str, attempt: int) -> None:
        self.run_dir = run_dir
        self.run_name = run_name
        self.attempt = attempt

    @abstractmethod
    def log(self, stage: str, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        """Notes scalars of an optimizer step; `step` counts within the stage."""

    def sync(self) -> None:
        """Makes what was logged durable; called before a checkpoint commits."""
        return

    def close(self) -> None:
        """Ends tracking."""
        return


class Trackers:
    """Several trackers as one; none on ranks other than 0."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, stage: str, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(stage, epoch, step, scalars)

    def sync(self) -> None:
        for tracker in self._trackers:
            tracker.sync()

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
