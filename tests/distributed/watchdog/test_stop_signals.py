"""Stops runs by real signals in this process: where they resume, and how their child processes end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dist_train
from dist_train.data.augment.steps import Augmentation
from dist_train.data.loader import Source
from dist_train.distributed.watchdog.stop_signals import ignore_in_worker, listening
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.status import fail
from dist_train.tasks import Classification
from dist_train.trackers.status import Status
from tests.support.ranks import ROOT
from tests.support.small_runs import STEPS, Runs


@dist_train.register_task("asks_to_stop")
class AsksToStop(Classification):
    """Sends itself SIGTERM in the loss of step `at`, or in an evaluation, or creates the file `late` there."""

    at: int | None = None
    seen = 0
    late: Path | None = None
    evaluating = False

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if outputs.requires_grad:
            AsksToStop.seen += 1
            if AsksToStop.at == AsksToStop.seen - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        elif AsksToStop.late is not None and AsksToStop.seen:
            AsksToStop.late.touch()
        elif AsksToStop.evaluating and AsksToStop.seen:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(outputs, targets)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    monkeypatch.setattr(AsksToStop, "seen", 0)
    return Runs(tmp_path)


@pytest.mark.slow
def test_a_stop_at_the_last_step_of_an_epoch_goes_on_with_its_evaluation(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--task.name", "asks_to_stop", "--train.epochs", "2", "--train.ema_decay", "0.9")
    assert runs("undisturbed", *options) == 0
    monkeypatch.setattr(AsksToStop, "at", 2 * STEPS + STEPS - 1)
    assert runs("stopped", *options) == 75
    assert runs.checkpoints("stopped").names() == [f"train-{STEPS:08d}-open"]
    assert read_json(runs.folder / "stopped" / "status.json")["step"] == STEPS
    assert runs("stopped", *options) == 0
    assert runs.product("stopped") == runs.product("undisturbed")
    assert runs.results("stopped")["models"] == runs.results("undisturbed")["models"]
    epochs = [line["epoch"] for line in runs.metrics("stopped") if "eval_top1" in line]
    assert epochs == [0, 1]


@pytest.mark.slow
def test_what_was_said_to_an_earlier_run_here_is_not_heard_by_this_one(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts are counted from 0 again after --fast-dev-run, or if everything but the logs was removed."""
    run_dir = RunDir(runs.folder / "run")
    run_dir.stuck(0).mkdir(parents=True)
    (run_dir.stuck(0) / "rank0.json").write_text("{}")
    run_dir.stopping(0).touch()
    monkeypatch.setattr(AsksToStop, "late", run_dir.stop)
    assert runs("run", "--task.name", "asks_to_stop", "--train.epochs", "1") == 0
    assert not run_dir.stuck(0).exists() and not run_dir.stopping(0).exists()
    assert not run_dir.stop.exists(), "it came too late"


def test_what_befalls_a_run_that_is_done_makes_no_failure_of_it(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    status = Status(run_dir, "run", 0)
    status.set(state="done")
    fail(run_dir, 0, BrokenPipeError())
    assert read_json(run_dir.status)["state"] == "done"
    fail(run_dir, 1, ValueError("of the next attempt"))
    assert read_json(run_dir.status)["state"] == "failed"


def test_a_stop_between_stages_says_how_many_steps_the_finished_one_has(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--task.name", "asks_to_stop", "--train.epochs", "1", "--stages", "[train, half]")
    monkeypatch.setattr(AsksToStop, "evaluating", True)
    assert runs("run", *options) == 75
    status = read_json(runs.folder / "run" / "status.json")
    assert (status["state"], status["stage"], status["step"]) == ("preempted", "train", STEPS)


class _Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(1, 2, 2), index


_struck = False


def _strike_in_child() -> None:
    if _struck:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_worker_lives_through_a_signal_that_comes_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening():
        os.register_at_fork(after_in_child=_strike_in_child)  # registered after our own hook, so it runs after that one
        monkeypatch.setattr("tests.distributed.watchdog.test_stop_signals._struck", True)
        source = Source(_Rows(), Augmentation([], seed=0, mean=(), std=()), torch.device("cpu"), False, 1, 0)
        batches = list(source.batches(iter([np.arange(4)]), None))
    assert batches[0].targets.tolist() == [0, 1, 2, 3]


def _rank(send: Connection) -> None:
    worker = multiprocessing.get_context("fork").Process(target=_worker, args=(send,))
    worker.start()
    worker.join()


def _worker(send: Connection) -> None:
    ignore_in_worker(0)
    send.send(os.getpid())
    signal.pause()


def test_a_worker_does_not_outlive_a_rank_that_is_killed() -> None:
    receive, send = multiprocessing.Pipe(duplex=False)
    rank = multiprocessing.get_context("fork").Process(target=_rank, args=(send,))
    rank.start()
    send.close()
    worker = receive.recv()
    rank.kill()
    rank.join(10)
    try:
        assert receive.poll(10), "the worker still holds the other end"
    finally:
        if not receive.poll(0):
            os.kill(worker, signal.SIGKILL)
    with pytest.raises(EOFError):
        receive.recv()


LIBRARY = """
import multiprocessing, pathlib, signal, sys
import numpy as np, torch
from dist_train.data.augment.steps import Augmentation
from dist_train.data.rows import Source
from dist_train.distributed.watchdog.stop_signals import listening
from tests.distributed.watchdog.test_stop_signals import _Rows

def users(ready):
    def clean_up(number, frame):
        pathlib.Path(sys.argv[1]).touch()
        sys.exit()
    signal.signal(signal.SIGTERM, clean_up)
    ready.set()
    signal.pause()

context = multiprocessing.get_context("fork")
ready = context.Event()
daemon = context.Process(target=users, args=(ready,), daemon=True)
daemon.start()
ready.wait()
with listening():
    source = Source(_Rows(), Augmentation([], seed=0, mean=(), std=()), torch.device("cpu"), False, 1, 0)
    assert len(list(source.batches(iter([np.arange(4)]), None))) == 1
    kept = source._loader._iterator  # as if it were still in use: its worker ignores SIGTERM
    kept._shutdown_workers = lambda: None
"""


@pytest.mark.heavy
def test_a_daemon_of_a_user_s_own_can_clean_up_when_a_program_ends_and_a_worker_of_ours_does_not_hold_it_up(
    tmp_path: Path,
) -> None:
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", LIBRARY, str(tmp_path / "cleaned up")],
        env=environ,
        cwd=tmp_path,
        check=True,
        timeout=60,
        capture_output=True,
    )
    assert (tmp_path / "cleaned up").exists()
