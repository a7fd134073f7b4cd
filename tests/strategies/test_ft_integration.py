"""Strategy ft: replicas that are killed, told to leave, and come back train on the global batches of one process."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.ledger import check, read_steps
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import ROOT, Ranks

pytestmark = pytest.mark.timeout(600)
DEADLINE = 240.0
EPOCH = 6  # steps

CONFIG = """
run: {name: replicas, device: cpu, threads_per_rank: 1}
data: {name: paced, global_batch_size: 8, workers: 0}
model: {name: mlp, args: {size: 8, hidden: 8}}
strategy: ft
stages: [train]
train: {epochs: 40, evaluate_every: 4, ema_decay: 0.9, optim: {lr: 0.05}}
log: {every_steps: 1}
debug: {ledger: true}
"""


class Replicas:
    """Replicas of one run, and the lighthouse at which they meet. A new start of a replica has its number again."""

    def __init__(self, folder: Path, address: str) -> None:
        (folder / "ft.yaml").write_text(CONFIG)
        self.folder, self._address = folder, address
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._out: list[tuple[int, Any]] = []

    def start(self, number: int, *settings: str, **variables: str) -> None:
        out = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `end`)
        self._out.append((number, out))
        words = [sys.executable, "-m", "dist_train", "run", "ft.yaml", "--import", "tests.support.paced_data"]
        environ = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        self.processes[number] = subprocess.Popen(
            [*words, "--run.dir", "run", *settings],
            cwd=self.folder,
            env={**os.environ, **environ, "TORCHFT_LIGHTHOUSE": self._address, "REPLICA_GROUP_ID": str(number)}
            | variables,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def run_dir(self, number: int) -> RunDir:
        return RunDir(self.folder / "run" / f"replica-{number}")

    def lines(self, number: int) -> list[dict[str, Any]]:
        file = self.run_dir(number).ledger_of(0)
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def shares(self, number: int) -> list[dict[str, Any]]:
        return [line for line in self.lines(number) if "ids" in line]

    def step(self, number: int) -> int:
        """The step in which this replica is, or was last; -1 before the first."""
        return max((line["step"] for line in self.shares(number)[-1:]), default=-1)

    def has_reached(self, number: int, step: int) -> bool:
        return self.step(number) >= step

    def reach(self, ranks: int, number: int = 0) -> None:
        """Waits until this replica takes part in a step of so many, which is begun after now."""
        known = len(self.shares(number))
        self.until(lambda: any(line["world_size"] == ranks for line in self.shares(number)[known:]), f"{ranks} ranks")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, f"no {what} within {DEADLINE:.0f} s:\n{self.printed()}"
            time.sleep(0.02)

    def kill(self, number: int) -> None:
        os.killpg(self.processes[number].pid, signal.SIGKILL)
        self.processes[number].wait(30)

    def kill_in_step(self, number: int) -> None:
        """Kills a replica while all that run have begun a step, and none has its rows."""
        self.make("hold")
        running = [each for each in self.processes.values() if each.poll() is None]
        self.until(lambda: all((self.folder / f"held-{each.pid}").exists() for each in running), "step of all")
        self.kill(number)
        self.remove("hold")

    def code(self, number: int) -> int:
        try:
            return self.processes[number].wait(DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"replica {number} still runs after {DEADLINE:.0f} s:\n{self.printed()}") from None

    def make(self, name: str) -> None:
        (self.folder / name).touch()

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()

    def weights(self, number: int) -> dict[str, torch.Tensor]:
        return weights(self.run_dir(number))

    def printed(self) -> str:
        texts = []
        for number, out in self._out:
            out.seek(0)
            texts.append(f"--- replica {number}\n{out.read()}")
        return "\n".join(texts)

    def end(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(30)
        for _, out in self._out:
            out.close()


def weights(run_dir: RunDir) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = CheckpointFolder(run_dir.checkpoints).load("train-end")["payload"]["model"]
    return found


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[Replicas]:
    coordination = pytest.importorskip("torchft.coordination", reason="only with torchft, which the extra ft brings")
    server = coordination.LighthouseServer(
        bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=500, heartbeat_timeout_ms=2000
    )
    made = Replicas(tmp_path, f"http://127.0.0.1:{server.address().rpartition(':')[2]}")
    try:
        yield made
    finally:
        made.end()
        server.shutdown()


def alone(folder: Path, *settings: str) -> dict[str, torch.Tensor]:
    """Weights of the same configuration on one process, without replicas."""
    words = ["-m", "dist_train", "run", "ft.yaml", "--import", "tests.support.paced_data", "--strategy", "single"]
    with Ranks(1, [*words, "--run.dir", "alone", *settings], folder=folder, cold=True) as ranks:
        assert ranks.wait(DEADLINE) == [0], ranks.printed()
    return weights(RunDir(folder / "alone"))


def near(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(first[name], second[name], atol=1e-5, rtol=0) for name in first)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_one_of_three_is_killed_and_comes_back_and_another_leaves(replicas: Replicas, tmp_path: Path) -> None:
    for number in range(3):
        replicas.start(number)
    replicas.reach(3)
    replicas.until(lambda: replicas.step(2) % EPOCH == 2, "middle of an epoch")
    replicas.kill_in_step(2)
    replicas.reach(2)
    replicas.start(2)
    replicas.reach(3)
    replicas.processes[1].send_signal(signal.SIGTERM)
    assert replicas.code(1) == 75, replicas.printed()
    replicas.reach(2)
    replicas.make("fast")
    assert [replicas.code(0), replicas.code(2)] == [0, 0], replicas.printed()
    assert "is done again" in replicas.printed() and "goes on with the others' step" in replicas.printed()
    report = check(tmp_path / "run")
    assert report.ok, f"{report}\n{replicas.printed()}"
    assert len(report.epochs) == 40
    sizes = [lines[0]["world_size"] for _, lines in sorted(read_steps(tmp_path / "run").items())]
    assert {2, 3} <= set(sizes)
    assert same(replicas.weights(0), replicas.weights(2))
    assert near(replicas.weights(0), alone(tmp_path))


@pytest.mark.slow
def test_statistics_and_workers_survive_a_step_that_is_done_again(replicas: Replicas, tmp_path: Path) -> None:
    settings = ("--model.name", "small_resnet", "--model.args", "{width: 8}", "--data.workers", "1")
    settings += ("--train.epochs", "12")
    for number in range(2):
        replicas.start(number, *settings)
    replicas.reach(2)
    replicas.until(lambda: replicas.step(0) % EPOCH == 3, "middle of an epoch")
    replicas.kill(1)
    replicas.reach(1)
    replicas.start(1, *settings)
    replicas.reach(2)
    replicas.make("fast")
    assert [replicas.code(0), replicas.code(1)] == [0, 0], replicas.printed()
    report = check(tmp_path / "run")
    assert report.ok and len(report.epochs) == 12, f"{report}\n{replicas.printed()}"
    assert same(replicas.weights(0), replicas.weights(1))


@pytest.mark.slow
def test_all_are_killed_and_go_on_from_the_newest_checkpoint(replicas: Replicas, tmp_path: Path) -> None:
    every = ("--checkpoint.every_steps", "2", "--train.epochs", "10")
    replicas.start(0, *every)
    replicas.reach(1)
    replicas.start(1, *every)
    replicas.reach(2)
    replicas.until(lambda: replicas.step(0) >= EPOCH + 3, "second epoch")
    replicas.kill(0)
    replicas.kill(1)
    for number in range(2):
        replicas.start(number, *every)
    replicas.reach(2)
    replicas.make("fast")
    assert [replicas.code(0), replicas.code(1)] == [0, 0], replicas.printed()
    report = check(tmp_path / "run")
    assert report.ok and len(report.epochs) == 10, f"{report}\n{replicas.printed()}"
    assert same(replicas.weights(0), replicas.weights(1))
    assert near(replicas.weights(0), alone(tmp_path, *every))


@pytest.mark.slow
def test_one_that_is_frozen_is_left_behind_and_goes_on_with_the_others_when_it_wakes(
    replicas: Replicas, tmp_path: Path
) -> None:
    for number in range(2):
        replicas.start(number, TORCHFT_TIMEOUT_SEC="5")
    replicas.reach(2)
    replicas.processes[1].send_signal(signal.SIGSTOP)
    replicas.reach(1)
    replicas.processes[1].send_signal(signal.SIGCONT)
    replicas.reach(2)
    replicas.make("fast")
    assert [replicas.code(0), replicas.code(1)] == [0, 0], replicas.printed()
    assert check(tmp_path / "run").ok, replicas.printed()
    assert same(replicas.weights(0), replicas.weights(1))


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(2))
def test_kills_at_random_moments(replicas: Replicas, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    settings = ("--train.epochs", "300", "--train.evaluate_every", "20", "--checkpoint.every_steps", "50")
    for number in range(3):
        replicas.start(number, *settings)
    replicas.reach(3)
    for _ in range(8):
        victim, moment = draw.randrange(3), draw.random()
        replicas.reach(3, victim)
        step = replicas.step(victim) + draw.randrange(1, 20)
        replicas.until(functools.partial(replicas.has_reached, victim, step), "the step")
        time.sleep(moment / 10)  # at no boundary
        replicas.kill(victim)
        replicas.start(victim, *settings)
    replicas.make("fast")
    assert [replicas.code(number) for number in range(3)] == [0, 0, 0], replicas.printed()
    report = check(tmp_path / "run")
    assert report.ok and len(report.epochs) == 300, f"{report}\n{replicas.printed()}"
    assert same(replicas.weights(0), replicas.weights(1)) and same(replicas.weights(0), replicas.weights(2))
    assert near(replicas.weights(0), alone(tmp_path, *settings))


@pytest.mark.slow
def test_one_with_other_settings_is_refused_and_the_others_go_on(replicas: Replicas, tmp_path: Path) -> None:
    replicas.start(0)
    replicas.reach(1)
    replicas.start(1, "--train.optim.lr", "0.1")
    assert replicas.code(1) == 78, replicas.printed()
    assert "train.optim.lr: was 0.05, is 0.1" in replicas.printed()
    assert "the other replicas have other settings: start all with the same" in replicas.printed()
    replicas.make("fast")
    assert replicas.code(0) == 0, replicas.printed()
    assert check(tmp_path / "run").ok
    evaluate = ["-m", "dist_train", "evaluate", "run/replica-0", "--import", "tests.support.paced_data"]
    with Ranks(1, evaluate, folder=tmp_path) as alone:  # which has no lighthouse
        assert alone.wait() == [0] and "fp32" in alone.output(0), alone.printed()


@pytest.mark.slow
def test_no_lighthouse_answers(replicas: Replicas) -> None:
    replicas.start(0, TORCHFT_LIGHTHOUSE="http://127.0.0.1:9", TORCHFT_TIMEOUT_SEC="2")
    assert replicas.code(0) == 78
    assert "torchft's lighthouse at http://127.0.0.1:9 does not answer" in replicas.printed()


@pytest.mark.slow
def test_one_that_waits_for_more_is_told_to_stop_and_saves(replicas: Replicas, tmp_path: Path) -> None:
    coordination = pytest.importorskip("torchft.coordination", reason="only with torchft, which the extra ft brings")
    server = coordination.LighthouseServer(
        bind="127.0.0.1:0", min_replicas=2, join_timeout_ms=500, heartbeat_timeout_ms=2000
    )
    two = {"TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{server.address().rpartition(':')[2]}"}
    try:
        for number in range(2):
            replicas.start(number, **two)
        replicas.reach(2)
        replicas.kill(1)
        replicas.until(lambda: "waits, up to" in replicas.printed(), "word of the wait")
        replicas.processes[0].send_signal(signal.SIGTERM)
        assert replicas.code(0) == 75, replicas.printed()
        step = replicas.step(0)
        assert f"stopped in train after step {step + 1} of" in replicas.printed() or (
            f"stopped in train after step {step} of" in replicas.printed()
        )
        assert "it is ended now" not in replicas.printed()
    finally:
        server.shutdown()


@pytest.mark.slow
def test_a_lighthouse_that_starts_again_costs_no_wait_for_a_group_of_the_same_number(
    replicas: Replicas, tmp_path: Path
) -> None:
    pytest.importorskip("torchft", reason="only with torchft, which the extra ft brings")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["torchft_lighthouse", "--bind", f"127.0.0.1:{port}", "--min_replicas", "1", "--join_timeout_ms", "1000"]
    lighthouse = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        for number in range(2):
            replicas.start(number, TORCHFT_LIGHTHOUSE=f"http://127.0.0.1:{port}", TORCHFT_TIMEOUT_SEC="300")
        replicas.reach(2)
        lighthouse.kill()
        lighthouse.wait(30)
        lighthouse = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        replicas.reach(2)
        replicas.make("fast")
        assert [replicas.code(0), replicas.code(1)] == [0, 0], replicas.printed()
        assert check(tmp_path / "run").ok, replicas.printed()
    finally:
        lighthouse.kill()
        lighthouse.wait(30)
