"""Stops runs at any moment, by a signal or a file, on one rank or all.

The run saves one checkpoint, ends in time as `preempted` with exit code 75, and resumes to the same result.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from dist_train.run_dir.ledger import check
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import Ranks, train, train_done

CONFIG = """
compile: false  # its estimate runs the model once more, and the tests count
run: {name: stopped, threads_per_rank: 1, device: cpu, timeout: 60}
data: {name: held, global_batch_size: 12, workers: 1}
model: {name: held}
task: {name: held}
stages: [train]
train: {epochs: 3, optim: {lr: 0.05}}
qat: {backend: held, epochs: 1}
export: {latency: false}
stop: {grace: 20}
trackers: [jsonl, held]
debug: {ledger: true}
"""
STEPS = 10  # per epoch


class Case:
    """A configuration in a folder, and its run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "stopped.yaml"
        self.config.write_text(CONFIG)
        self.run_dir = RunDir(folder / "run")
        self.words = [
            "run",
            str(self.config),
            "--import",
            "tests.support.blocking_parts",
            "--run.dir",
            str(self.run_dir.path),
        ]

    def start(self, world_size: int, hold: str, *options: str, **environ: str) -> Ranks:
        return train(world_size, *self.words, *options, environ={"HOLD": hold, "HOLD_DIR": str(self.folder)} | environ)

    def reached(self, ranks: Ranks) -> None:
        assert ranks.until((self.folder / "reached").exists), ranks.printed()

    def go(self) -> None:
        (self.folder / "go").touch()

    def status(self) -> Any:
        return read_json(self.run_dir.status)

    def finished(self) -> bytes:
        """Finishes the run on two ranks and returns the weights."""
        train_done(2, *self.words)
        assert check(self.run_dir.path).ok
        return (self.run_dir.checkpoints / "train-end" / "tensors.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return Case(tmp_path_factory.mktemp("undisturbed")).finished()


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def steps_saved(case: Case) -> list[int]:
    """Returns the steps of the checkpoints saved within the stage."""
    names = CheckpointFolder(case.run_dir.checkpoints).names()
    return [int(name.split("-")[1]) for name in names if not name.endswith("-end")]


def test_a_signal_to_one_rank_stops_all_after_the_same_step_with_one_checkpoint(case: Case) -> None:
    with case.start(2, "forward 1 15 wait") as ranks:
        case.reached(ranks)  # in the second epoch
        os.kill(ranks.processes[1].pid, signal.SIGUSR2)
        os.kill(ranks.processes[1].pid, signal.SIGUSR2)
        case.go()
        assert ranks.wait() == [75, 75], ranks.printed()
        first, last = steps_saved(case)
        assert first == STEPS < last < 2 * STEPS
        assert f"stopped in train after step {last} of 30, which is saved" in ranks.output(0)
        assert "stopped in" not in ranks.output(1)
    assert case.status() == {"state": "preempted", "stage": "train", "step": last, "restarts": 0, "error": None}


@pytest.mark.slow
def test_under_an_agent_a_rank_that_was_stopped_ends_with_0_so_that_it_is_not_started_again(case: Case) -> None:
    with case.start(1, "forward 0 3 wait", TORCHELASTIC_RUN_ID="x") as ranks:
        case.reached(ranks)
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        case.go()
        assert ranks.wait() == [0], ranks.printed()
    assert case.status()["state"] == "preempted"


@pytest.mark.slow
def test_a_signal_to_a_rank_that_has_stopped_and_is_about_to_exit_changes_nothing(case: Case) -> None:
    """Slurm signals all processes, and the agent forwards its own signal, so a rank may get two."""
    case.run_dir.path.mkdir()
    case.run_dir.stop.touch()
    with case.start(1, "exit 0 0 wait") as ranks:
        case.reached(ranks)
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        case.go()
        assert ranks.wait() == [75], ranks.printed()
    assert case.status()["state"] == "preempted"


@pytest.mark.slow
def test_the_file_stop_ends_the_run_and_is_gone_then(case: Case, undisturbed: bytes) -> None:
    with case.start(2, "forward 0 15 wait") as ranks:
        case.reached(ranks)
        case.run_dir.stop.touch()
        time.sleep(1)  # the watcher polls for the file twice a second; any step from 15 on will do
        case.go()
        assert ranks.wait() == [75, 75], ranks.printed()
    assert not case.run_dir.stop.exists()
    assert len([step for step in steps_saved(case) if step % STEPS]) == 1
    assert case.finished() == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        "set-up 0 0 wait",
        "data 1 70 wait",  # in a data worker, which gets the signal, too
        "evaluate 1 1 wait",
        "save 0 1 wait",
    ],
)
def test_all_processes_are_told_at_any_moment_and_end_at_the_next_step_as_if_nothing_had_been(
    case: Case, undisturbed: bytes, place: str
) -> None:
    with case.start(2, place) as ranks:
        case.reached(ranks)
        for process in ranks.processes:
            os.killpg(process.pid, signal.SIGTERM)
        case.go()
        assert ranks.wait() == [75, 75], ranks.printed()
    assert case.status()["state"] == "preempted"
    assert not list(case.run_dir.checkpoints.glob(".*")), "half a checkpoint"
    if place.startswith("set-up"):  # there is no progress to save yet
        assert not (case.run_dir.checkpoints / "latest.json").exists()
    if place.startswith("evaluate"):  # the epoch's end is saved in any case
        assert steps_saved(case)[-1] % STEPS == 0
    assert case.finished() == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "asked", "codes"),
    [
        ("wait", 0, {75}),  # the other rank, which waits for the stuck one
        ("wait", 1, {75}),
        ("lock", 0, {75, -signal.SIGKILL}),
    ],
)
def test_a_step_that_is_longer_than_the_grace_is_given_up_and_the_last_checkpoint_serves(
    case: Case, undisturbed: bytes, how: str, asked: int, codes: set[int]
) -> None:
    with case.start(2, f"forward 1 15 {how}", "--stop.grace", "4") as ranks:
        case.reached(ranks)
        os.kill(ranks.processes[asked].pid, signal.SIGTERM)
        began = time.monotonic()
        assert set(ranks.wait()) <= codes, ranks.printed()
        assert time.monotonic() - began < 4 + 15
        assert "was asked to stop and is still in" in ranks.printed()
    assert (case.status()["state"], case.status()["step"]) == ("preempted", STEPS)
    assert steps_saved(case) == [STEPS]
    if how == "lock":  # the other cases leave the same files
        assert case.finished() == undisturbed


@pytest.mark.slow
def test_an_agent_that_starts_ranks_again_does_not_undo_a_stop_of_which_it_knows_nothing(case: Case) -> None:
    """One rank had to be killed, which counts as a failure to the agent."""
    words = [*("launch", "torchrun", "--nproc-per-node", "2", "--restarts", "2"), *case.words[1:], "--stop.grace", "4"]
    with train(1, *words, environ={"HOLD": "forward 1 15 lock", "HOLD_DIR": str(case.folder)}) as launch:
        case.reached(launch)
        family = psutil.Process(launch.processes[0].pid).children(recursive=True)
        rank_0 = [each for each in family if "dist_train" in each.cmdline() and each.environ().get("RANK") == "0"]
        rank_0[0].send_signal(signal.SIGTERM)
        assert launch.wait(60) == [75], launch.printed()
        assert "the run was asked to stop, so it does not resume" in launch.printed()
    assert case.status() == {"state": "preempted", "stage": "train", "step": STEPS, "restarts": 0, "error": None}


WHOLE = ("--stages", "[train, ptq, qat, convert, export]")


def deployed(case: Case) -> dict[str, bytes]:
    """Resumes the run to its end and returns the artifact's files."""
    with train(2, *case.words, *WHOLE, environ={"PLAIN": "1"}) as ranks:
        assert ranks.wait() == [0, 0], ranks.printed()
    assert check(case.run_dir.path).ok
    return {path.name: path.read_bytes() for path in (case.run_dir.path / "export").iterdir()}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return deployed(Case(tmp_path_factory.mktemp("deployed")))


@pytest.mark.slow
@pytest.mark.parametrize(("place", "stage"), [("evaluate 1 3 wait", "ptq"), ("evaluate 1 4 wait", "qat")])
def test_stopped_in_a_later_stage_it_ends_with_the_artifact_of_an_undisturbed_run(
    case: Case, artifact: dict[str, bytes], place: str, stage: str
) -> None:
    with case.start(2, place, *WHOLE, PLAIN="1") as ranks:
        case.reached(ranks)
        for process in ranks.processes:
            os.killpg(process.pid, signal.SIGTERM)
        case.go()
        assert ranks.wait() == [75, 75], ranks.printed()
    assert (case.status()["state"], case.status()["stage"]) == ("preempted", stage)
    assert deployed(case) == artifact


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "before"), [("convert", "qat-end"), ("export", "convert-end")])
def test_what_rank_0_does_alone_is_given_up_and_the_checkpoint_before_it_serves(
    case: Case, artifact: dict[str, bytes], stage: str, before: str
) -> None:
    with case.start(2, f"{stage} 0 0 wait", *WHOLE, "--stop.grace", "3", PLAIN="1") as ranks:
        case.reached(ranks)
        os.kill(ranks.processes[1].pid, signal.SIGUSR2)  # the waiting rank, not rank 0, which works
        ranks.wait()
    assert case.status() == {"state": "preempted", "stage": stage, "step": 0, "restarts": 0, "error": None}
    assert CheckpointFolder(case.run_dir.checkpoints).latest == before
    assert not (case.run_dir.path / "export").exists(), "it would look whole"
    assert deployed(case) == artifact


@pytest.mark.slow
def test_where_a_peer_is_dead_a_signal_saves_nothing_and_the_previous_checkpoint_serves(
    case: Case, undisturbed: bytes
) -> None:
    with case.start(2, "forward 0 15 wait") as ranks:
        case.reached(ranks)
        ranks.kill([1])
        os.kill(ranks.processes[0].pid, signal.SIGTERM)  # as torchrun's agent does before it restarts all ranks
        case.go()
        assert ranks.wait()[0] == 1, ranks.printed()
        assert "the connection to another rank was lost" in ranks.output(0)
    assert case.status()["state"] == "failed"
    assert steps_saved(case) == [STEPS]
    assert case.finished() == undisturbed
