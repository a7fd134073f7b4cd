"""Jobs that train are told to stop, by Slurm itself or by a signal before their end; they go back into the queue and finish by themselves."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dist_train.run_dir.ledger import check
from tests.launchers.test_same_weights_integration import finish, start
from tests.support.ranks import train_done
from tests.support.slurm_cluster import SMALL, Cluster
from tests.support.wandb_files import run_ids

EPOCHS = 120
CONFIG = SMALL.replace("epochs: 2", f"epochs: {EPOCHS}") + "debug: {ledger: true}\nstop: {grace: 12}\n"
WANDB = ("--trackers", "[jsonl, wandb]", "--wandb.mode", "offline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preempted")
    (path / "small.yaml").write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> bytes:
    # The config's `cache_dir: cache` is relative, and pytest's folder is not for writing.
    cache = ("--data.cache_dir", str(folder / "cache"))
    train_done(2, "run", str(folder / "small.yaml"), "--run.dir", str(folder / "undisturbed"), *cache)
    return weights(folder / "undisturbed")


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "train-end" / "tensors.safetensors").read_bytes()


def status(run: Path) -> Any:
    return json.loads((run / "status.json").read_text())


def submit(cluster: Cluster, folder: Path, run: str, options: Sequence[str] = (), settings: Sequence[str] = ()) -> str:
    words = ("--nproc-per-node", "2", "--partition", "low", *options, "--submit", "small.yaml", "--run.dir", run)
    launched = cluster.launch(*words, *settings, cwd=folder)
    assert launched.returncode == 0, launched.stderr
    return launched.stdout.strip()


def lines(run: Path) -> int:
    """Lines of metrics: one for each epoch, and for each ten steps."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def trains(run: Path) -> Callable[[], bool]:
    """Whether it is in the middle of its work."""
    return lambda: lines(run) > 50


def assert_finished_exactly(run: Path, expected: bytes, attempts: int) -> None:
    assert (status(run)["state"], status(run)["restarts"]) == ("done", attempts - 1)
    assert weights(run) == expected
    assert check(run).ok, str(check(run))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_a_higher_partition_takes_the_nodes_from_finishes_by_itself_with_the_same_weights(
    cluster: Cluster, folder: Path, undisturbed: bytes
) -> None:
    run = folder / "preempted"
    number = submit(cluster, folder, "preempted", settings=WANDB)
    cluster.until(trains(run), 120, lambda: cluster.output(number))
    taker = cluster.submit("#!/bin/bash\nsleep 2\n", folder, "--partition=high", "--nodes=4", "--exclusive")
    assert cluster.ended(taker)["JobState"] == "COMPLETED"
    job = cluster.ended(number, 400)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), cluster.output(number)
    assert "saved" in cluster.output(number) and "resuming (attempt 1) in train at step" in cluster.output(number)
    assert_finished_exactly(run, undisturbed, attempts=2)
    assert not (run / "STOP").exists()
    ids = run_ids(run / "logs" / "wandb")
    assert len(ids) == 2 and set(ids) == {(run / "logs" / "wandb" / "run_id").read_text().strip()}, "one run of wandb's"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", [(), ("--task-per-rank",)], ids=["torchrun", "task-per-rank"])
def test_of_an_array_the_task_that_is_told_to_stop_is_requeued_and_its_sibling_goes_on(
    cluster: Cluster, folder: Path, undisturbed: bytes, layout: tuple[str, ...]
) -> None:
    name = f"array{'-tasks' if layout else ''}"
    number = submit(cluster, folder, name, ("--sbatch.array", "0-1", *layout))
    runs = [folder / f"{name}-{task}" for task in (0, 1)]
    cluster.until(lambda: all(trains(run)() for run in runs), 120)
    cluster.run(
        "scancel", "--batch", "--signal=USR2", f"{number}_0"
    )  # as --signal=B:USR2@180 does before the time is up
    cluster.until(lambda: cluster.run("squeue", "-h", "-j", number).stdout == "", 400)
    assert_finished_exactly(runs[0], undisturbed, attempts=2)
    assert_finished_exactly(runs[1], undisturbed, attempts=1)
    assert [cluster.job(f"{number}_{task}")["Restarts"] for task in (0, 1)] == ["1", "0"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_launch_torchrun_passes_a_signal_on_ends_with_75_and_goes_on(folder: Path, undisturbed: bytes) -> None:
    run = folder / "launched"
    codes = []
    for number in (signal.SIGTERM, signal.SIGUSR2, None):
        launched = start(folder, "torchrun", "--nproc-per-node", "2", "small.yaml", "--run.dir", "launched")
        before = lines(run)
        while number is not None and lines(run) < before + 50 and launched.poll() is None:
            time.sleep(0.1)
        if number is not None:
            launched.send_signal(number)
        finish(launched, expected=75 if number is not None else 0)
        codes.append(status(run)["state"])
    assert codes == ["preempted", "preempted", "done"]
    assert_finished_exactly(run, undisturbed, attempts=3)
