"""Checkpoints that are written beside the loop: killed, stopped and failing runs with a save in flight, on two ranks.

The save of step 6 is held in front of an fsync, while the loop goes on to the next save.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from dist_train.errors import EXIT_FAILED, EXIT_PREEMPTED
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from dist_train.run_dir.ledger import check
from dist_train.run_dir.paths import RunDir
from tests.support.blocking_parts import SYNCS
from tests.support.ranks import Ranks, train, train_done

CONFIG = """
run: {name: in_flight, threads_per_rank: 1, device: cpu, timeout: 120}
data: {name: held, global_batch_size: 12, workers: 0}
model: {name: held}
task: {name: held}
stages: [train]
train: {epochs: 2, optim: {lr: 0.05, momentum: 0.9}, ema_decay: 0.9}
log: {every_steps: 1}
checkpoint: {every_steps: 2}
debug: {ledger: true}
"""
FORMER, HELD, NEXT = "train-00000004", "train-00000006", "train-00000008"
FIRST = 2 * SYNCS  # the first fsync of the third save
UNPLACED, UNNAMED = FIRST + 2, FIRST + 5  # before the folder is renamed; before latest.json names it


class Case:
    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "in_flight.yaml"
        self.config.write_text(CONFIG)
        self.run_dir = RunDir(folder / "run")

    def words(self, run_dir: RunDir, *options: str) -> list[str]:
        parts = ["--import", "tests.support.blocking_parts", "--run.dir", str(run_dir.path)]
        return ["run", str(self.config), *parts, *options]

    def in_flight(self, sync: int, how: str = "wait", *options: str) -> Ranks:
        """Starts two ranks; returns when the save is held and both have gone on to the next one."""
        hold = {"HOLD": f"disk 0 {sync} {how}", "HOLD_DIR": str(self.folder)}
        ranks = train(2, *self.words(self.run_dir, *options), environ=hold)
        assert ranks.until((self.folder / "reached").exists), ranks.printed()
        if how == "wait":
            assert ranks.until(lambda: self.logged() >= 8), ranks.printed()
            assert self.latest() == FORMER
        return ranks

    def logged(self) -> int:
        """Returns the number of steps whose line is in metrics.jsonl."""
        lines = self.run_dir.metrics.read_text().splitlines() if self.run_dir.metrics.exists() else []
        return len([line for line in lines if "loss" in json.loads(line)])

    def latest(self) -> str | None:
        return CheckpointFolder(self.run_dir.checkpoints).latest

    def go(self) -> None:
        (self.folder / "go").touch()

    def resumed_as(self, undisturbed: RunDir) -> None:
        train_done(2, *self.words(self.run_dir))
        names = [CheckpointFolder(each.checkpoints).names() for each in (self.run_dir, undisturbed)]
        assert names[0] == names[1]
        for name in names[0]:
            tensors = [
                (each.checkpoints / name / "tensors.safetensors").read_bytes() for each in (self.run_dir, undisturbed)
            ]
            assert tensors[0] == tensors[1], name
        assert check(self.run_dir.path).ok
        assert not list(self.run_dir.checkpoints.glob(".*.tmp")), "nothing is left of the save that was killed"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run whose saves all ranks wait for."""
    case = Case(tmp_path_factory.mktemp("undisturbed"))
    train_done(2, *case.words(case.run_dir, "--checkpoint.asynchronous", "false"))
    return case.run_dir


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.parametrize(
    ("sync", "victims"),
    [
        pytest.param(UNPLACED, [0], id="rank 0, the files written"),
        pytest.param(UNNAMED, None, id="all, renamed", marks=pytest.mark.slow),
        pytest.param(UNNAMED, [0], id="rank 0, renamed", marks=pytest.mark.slow),
        pytest.param(UNPLACED, None, id="all, the files written", marks=pytest.mark.slow),
    ],
)
def test_killed_with_a_save_in_flight_a_run_ends_like_an_undisturbed_one(
    sync: int, victims: list[int] | None, case: Case, undisturbed: RunDir
) -> None:
    with case.in_flight(sync) as ranks:
        ranks.kill(victims)
        ranks.wait(60)
        assert "Traceback" not in ranks.printed()
    assert case.latest() == FORMER
    case.resumed_as(undisturbed)


@pytest.mark.slow
def test_a_stop_waits_until_all_is_saved(case: Case, undisturbed: RunDir) -> None:
    with case.in_flight(UNPLACED) as ranks:
        for process in ranks.processes:
            os.kill(process.pid, signal.SIGTERM)
        assert not (case.run_dir.checkpoints / NEXT).exists()
        assert read_json(case.run_dir.status)["state"] == "running"
        case.go()
        assert ranks.wait() == [EXIT_PREEMPTED] * 2, ranks.printed()
    status = read_json(case.run_dir.status)
    assert status["state"] == "preempted" and case.latest() == f"train-{status['step']:08d}" > NEXT
    assert NEXT in CheckpointFolder(case.run_dir.checkpoints).names()
    case.resumed_as(undisturbed)


@pytest.mark.slow
def test_an_error_of_the_thread_ends_all_ranks_in_the_words_of_a_save_that_waits(
    case: Case, undisturbed: RunDir
) -> None:
    with case.in_flight(UNPLACED, "full", "--checkpoint.retry", "0") as ranks:
        assert ranks.wait() == [EXIT_FAILED] * 2, ranks.printed()
        said = [ranks.output(rank) for rank in (0, 1)]
    message = f"cannot write the checkpoint {case.run_dir.checkpoints / HELD}: [Errno 28] No space left on device"
    assert f"dist-train: {message}" in said[0] and "make room or mend the file system" in said[0], said[0]
    assert "rank 0 failed: " in said[1] and message in said[1], said[1]
    assert not any("Traceback" in each for each in said)
    status = read_json(case.run_dir.status)
    assert status["state"] == "failed" and message in status["error"]
    assert case.logged() <= 9, "the ranks learn of it within a step or two"
    assert case.latest() == FORMER
    case.resumed_as(undisturbed)
