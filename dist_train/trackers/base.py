"""What the loop asks of a tracker, and several trackers as one, none of which can stop a training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dist_train.run_dir.paths import RunDir

if TYPE_CHECKING:
    from dist_train.config.tree import Config


class Tracker(ABC):
    """Receives scalars on rank 0."""

    def __init__(self, run_dir: RunDir, run_name: str, attempt: int) -> None:
        self.run_dir = run_dir
        self.run_name = run_name
        self.attempt = attempt

    def begin(self, config: Config) -> None:
        """Called once, before anything is logged, with the settings of this attempt."""
        return

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
    """Several trackers as one; none on ranks other than 0.

    Args:
        trackers: those of the user. One that raises is left out from then on, and `say` is told why, once: hours of training are
            worth more than a curve.
        internal: ours, whose errors end the run.
    """

    def __init__(
        self, trackers: Sequence[Tracker], internal: Sequence[Tracker] = (), say: Callable[[str], None] = print
    ) -> None:
        self._trackers = list(trackers)
        self._internal = tuple(internal)
        self._say = say

    def add(self, name: str, make: Callable[[], Tracker], config: Config) -> None:
        """Makes and begins one more tracker; where that fails, says so."""
        try:
            tracker = make()
            tracker.begin(config)
        except Exception as error:  # whatever a tracker raises: it is other people's code, often about a network
            self._say(f"the tracker {name} does not start, and is left out: {_in_a_line(error)}")
        else:
            self._trackers.append(tracker)

    def log(self, stage: str, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(stage, epoch, step, scalars))

    def sync(self) -> None:
        self._each(lambda tracker: tracker.sync())

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in self._internal:
            act(tracker)
        for tracker in tuple(self._trackers):
            try:
                act(tracker)
            except Exception as error:  # as in `add`
                self._trackers.remove(tracker)
                self._say(f"the tracker {type(tracker).__name__} failed, and is left out: {_in_a_line(error)}")


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
