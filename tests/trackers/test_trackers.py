"""Several trackers as one: a failing one is left out and named once, and ours are not swallowed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from dist_train.config.tree import Config
from dist_train.run_dir.paths import RunDir
from dist_train.trackers.base import Tracker, Trackers
from tests.support.training_loops import Recorder


class Failing(Tracker):
    """Raises in one of its methods."""

    def __init__(self, where: str) -> None:
        super().__init__(RunDir(Path()), "failing", 0)
        self._where = where
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self._where:
            raise ConnectionError(f"no answer\nin {name}")

    def begin(self, config: Config) -> None:
        self._call("begin")

    def log(self, stage: str, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        self._call("log")

    def sync(self) -> None:
        self._call("sync")

    def close(self) -> None:
        self._call("close")


def drive(trackers: Trackers) -> None:
    for step in range(3):
        trackers.log("train", 0, step, {"loss": 1.0})
        trackers.sync()
    trackers.close()


@pytest.mark.parametrize("where", ["log", "sync", "close"])
def test_a_failing_tracker_is_left_out_and_named_once_and_the_others_get_everything(where: str) -> None:
    said: list[str] = []
    failing, recorder = Failing(where), Recorder()
    drive(Trackers([failing, recorder], say=said.append))
    assert recorder.of("loss") == [1.0] * 3
    assert said == [f"the tracker Failing failed, and is left out: ConnectionError: no answer in {where}"]
    assert failing.calls.count(where) == 1 and failing.calls[-1] == where


def test_a_tracker_that_does_not_start_is_left_out_with_the_reason() -> None:
    said: list[str] = []
    trackers, recorder = Trackers([], say=said.append), Recorder()

    def refuse() -> Tracker:
        raise OSError("disk full")

    trackers.add("mine", lambda: Failing("begin"), Config())
    trackers.add("other", refuse, Config())
    trackers.add("recorder", lambda: recorder, Config())
    drive(trackers)
    assert said == [
        "the tracker mine does not start, and is left out: ConnectionError: no answer in begin",
        "the tracker other does not start, and is left out: OSError: disk full",
    ]
    assert recorder.of("loss") == [1.0] * 3


def test_errors_of_our_own_trackers_end_the_run() -> None:
    with pytest.raises(ConnectionError):
        drive(Trackers([], internal=[Failing("log")]))
