"""TensorBoard's curves of a run, read back from its event files as TensorBoard reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.run_dir.paths import RunDir
from dist_train.trackers.base import Trackers

pytest.importorskip("tensorboard", reason="no tensorboard: pip install tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_train.trackers.tensorboard import TensorBoard


def log(run_dir: RunDir, attempt: int, steps: range, value: float) -> None:
    trackers = Trackers([TensorBoard(run_dir, "run", attempt)])
    for step in steps:
        trackers.log("train", 0, step, {"loss": value + step})
    trackers.log("qat", 0, 0, {"loss": value})
    trackers.sync()
    trackers.close()


def read(run_dir: RunDir, stage: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir.tensorboard / stage))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_each_stage_has_its_own_steps(tmp_path: Path) -> None:
    log(RunDir(tmp_path), 0, range(4), 1.0)
    assert read(RunDir(tmp_path), "train") == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)]
    assert read(RunDir(tmp_path), "qat") == [(0, 1.0)]


def test_what_a_resumed_run_does_again_replaces_what_the_earlier_attempt_logged(tmp_path: Path) -> None:
    log(RunDir(tmp_path), 0, range(6), 1.0)
    log(RunDir(tmp_path), 1, range(3, 8), 100.0)
    assert read(RunDir(tmp_path), "train") == [
        (0, 1.0), (1, 2.0), (2, 3.0), (3, 103.0), (4, 104.0), (5, 105.0), (6, 106.0), (7, 107.0)
    ]  # fmt: skip
