"""Two starts on one run directory: one owns it, and the other waits for its end, or is refused in words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dist_train.errors import EXIT_DONE, EXIT_FAILED
from dist_train.run_dir.files import read_json
from dist_train.run_dir.ledger import check
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import ROOT, Ranks, train

CONFIG = """
compile: false  # its estimate runs the model once more, and the tests count
run: {name: owned, threads_per_rank: 1, device: cpu, timeout: 150}
data: {name: held, global_batch_size: 12, workers: 1}
model: {name: held}
task: {name: held}
stages: [train]
train: {epochs: 3, optim: {lr: 0.05}}
trackers: [jsonl, held]
debug: {ledger: true}
"""
HELD_AT_STEP_5 = "forward 0 5 wait"
BEFORE_CHECKPOINTS = "set-up 0 0 wait"


class Case:
    def __init__(self, folder: Path) -> None:
        self.folder, config = folder, folder / "owned.yaml"
        config.write_text(CONFIG)
        self.run_dir = RunDir(folder / "run")
        parts = ["--import", "tests.support.blocking_parts"]
        self.words = ["run", str(config), *parts, "--run.dir", str(self.run_dir.path)]

    def start(self, world_size: int, hold: str = "nowhere 0 0 wait", *options: str) -> Ranks:
        return train(world_size, *self.words, *options, environ={"HOLD": hold, "HOLD_DIR": str(self.folder)})

    def held(self, hold: str, world_size: int = 2) -> Ranks:
        ranks = self.start(world_size, hold)
        assert ranks.until((self.folder / "reached").exists), ranks.printed()
        return ranks

    def go(self) -> None:
        (self.folder / "go").touch()

    def files(self) -> dict[str, bytes]:
        """Every file but the owner's claim, which shows life."""
        paths = (path for path in self.run_dir.path.rglob("*") if path.is_file())
        return {str(path): path.read_bytes() for path in paths if not path.name.startswith(".owner-")}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("hold", [HELD_AT_STEP_5, BEFORE_CHECKPOINTS])
@pytest.mark.parametrize("options", [(), ("--train.optim.lr", "0.5")], ids=["the same", "another rate"])
def test_a_second_start_changes_no_byte_of_a_living_run(case: Case, hold: str, options: tuple[str, ...]) -> None:
    with case.held(hold) as first:
        before = case.files()
        with case.start(2, "nowhere 0 0 wait", *options) as second:
            assert second.wait() == [EXIT_FAILED, EXIT_FAILED]
            printed = second.printed()
        pid = first.processes[0].pid
        assert f"is used by another start (process {pid} on" in printed and "--run.dir DIR" in printed
        assert "Traceback" not in printed
        assert case.files() == before
        case.go()
        assert first.wait() == [EXIT_DONE, EXIT_DONE], first.printed()
    assert read_json(case.run_dir.status)["restarts"] == 0
    assert check(case.run_dir.path).ok
    assert not list(case.run_dir.path.glob(".owner-*"))


@pytest.mark.slow
def test_a_start_goes_on_as_soon_as_the_owner_was_killed(case: Case) -> None:
    with case.held(HELD_AT_STEP_5) as first:
        first.kill()
    with case.start(2) as second:
        assert second.wait() == [EXIT_DONE, EXIT_DONE], second.printed()
        assert "waiting" not in second.printed()
    assert check(case.run_dir.path).ok


@pytest.mark.slow
def test_a_start_that_waited_while_the_owner_finished_shows_its_results(case: Case) -> None:
    with case.held(HELD_AT_STEP_5) as first, case.start(2) as second:
        assert second.until(lambda: "waiting up to" in second.printed()), second.printed()
        case.go()
        assert first.wait() == [EXIT_DONE, EXIT_DONE], first.printed()
        assert second.wait() == [EXIT_DONE, EXIT_DONE], second.printed()
        assert "this run is done" in second.printed()
    assert read_json(case.run_dir.status)["restarts"] == 0


@pytest.mark.slow
def test_a_rank_that_outlives_the_others_is_named_and_then_waited_for(case: Case) -> None:
    with case.held(HELD_AT_STEP_5) as first:
        left = first.processes[1].pid
        watchers = psutil.Process(left).children()
        for process in (*watchers, psutil.Process(left)):
            process.send_signal(signal.SIGSTOP)  # so that it cannot notice
        first.kill([0])
        with case.start(2) as second:
            assert second.wait() == [EXIT_FAILED, EXIT_FAILED]
            assert f"process {left} on" in second.printed() and f"kill {left}" in second.printed()
    with case.start(2) as third:
        assert third.wait() == [EXIT_DONE, EXIT_DONE], third.printed()
    assert check(case.run_dir.path).ok


@pytest.mark.slow
def test_launch_refuses_before_it_starts_anything(case: Case) -> None:
    with case.held(HELD_AT_STEP_5) as first:
        before = case.files()
        words = [sys.executable, "-m", "dist_train", "launch", "torchrun", "--nproc-per-node", "2", *case.words[1:]]
        second = subprocess.run(
            words, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        assert second.returncode == EXIT_FAILED
        assert f"process {first.processes[0].pid} on" in second.stderr and "Traceback" not in second.stderr
        assert "torchrun" not in second.stderr and "torch.distributed" not in second.stderr
        assert case.files() == before
        case.go()
        assert first.wait() == [EXIT_DONE, EXIT_DONE], first.printed()


@pytest.mark.slow
def test_a_frozen_owner_that_was_taken_over_ends_without_touching_the_new_one(case: Case, tmp_path: Path) -> None:
    """The new owner stands for one on another machine, which cannot see that this one's processes live."""
    with case.held(HELD_AT_STEP_5) as first:
        (case.run_dir.path / ".owner-2.json").write_text('{"ranks": [], "beat": "000000000000"}\n')
        status = read_json(case.run_dir.status)
        case.run_dir.status.write_text(case.run_dir.status.read_text().replace('"restarts": 0', '"restarts": 1'))
        codes = first.wait()
        assert codes[0] == EXIT_FAILED and codes[1] != EXIT_DONE, first.printed()
        assert "was taken over by another start" in first.printed()
    assert read_json(case.run_dir.status) == {**status, "restarts": 1}
    assert (case.run_dir.path / ".owner-2.json").exists()
