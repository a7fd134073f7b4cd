"""Tracker: the base class of trackers; Trackers joins several, whose failures do not stop training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dist_train.errors import STOPS, text_of
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
        """Prepares the tracker with the settings of this attempt; called once, before the first log."""
        return

    @abstractmethod
    def log(self, stage: str, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        """Logs the scalars of an optimizer step; `step` counts within the stage."""

    def sync(self) -> None:
        """Writes all logged scalars to the disk; called before a checkpoint commits."""
        return

    def close(self) -> None:
        """Ends tracking."""
        return


class Trackers:
    """Several trackers as one; only rank 0 has any.

    Args:
        trackers: the user's trackers. One that raises is left out from then on, and `say` prints the reason once.
            Hours of training are worth more than a curve.
        internal: our trackers, whose errors end the run.
    """

    def __init__(
        self, trackers: Sequence[Tracker], internal: Sequence[Tracker] = (), say: Callable[[str], None] = print
    ) -> None:
        self._trackers = list(trackers)
        self._internal = tuple(internal)
        self._say = say

    def add(self, name: str, make: Callable[[], Tracker], config: Config) -> None:
        """Makes and begins another tracker; prints the reason where that fails."""
        try:
            tracker = make()
            tracker.begin(config)
        except STOPS:
            raise
        except BaseException as error:  # a tracker is other people's code, often about a network: it may raise anything
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
            except STOPS:
                raise
            except BaseException as error:  # as in `add`
                self._trackers.remove(tracker)
                self._say(f"the tracker {type(tracker).__name__} failed, and is left out: {_in_a_line(error)}")


def _in_a_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {text_of(error)}".split())
