"""Ranks that fail, die or are slow: all processes end soon, and the output names the cause."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from dist_train.config.tree import RunConfig
from dist_train.distributed.process_group import join
from dist_train.distributed.world import World
from dist_train.errors import DataError, DistTrainError, PeerError, SetupError
from tests.support.ranks import ROOT, Ranks, call, free_port, train

GONE = 20.0  # seconds after which no process may be left


def case(world_size: int, name: str, *arguments: str) -> Ranks:
    """Starts CASES[name] of this file on every rank."""
    return Ranks(world_size, ["-m", "tests.distributed.test_world_integration", name, *arguments])


# Code of the ranks. The world's timeout is far above GONE, so that no test passes by waiting for it.


def _fail_on(world: World, guilty: str) -> None:
    if world.rank == int(guilty):
        time.sleep(0.5)
        raise ValueError("planted")
    if world.rank == 2:
        world.on_rank_0(lambda: None, "what never ends", 100.0)
    world.barrier("never")


def _work_fails(world: World) -> None:
    def work() -> None:
        raise DataError("no such file", "give another")

    world.on_rank_0(work, "reading")


def _sleep_in_work(world: World, ready: str) -> None:
    def work() -> None:
        Path(ready).touch()
        time.sleep(100)

    world.on_rank_0(work, "sleeping", 100.0)


def _sleep_before_collective(world: World, sleeper: str, ready: str) -> None:
    if world.rank == int(sleeper):
        Path(ready).touch()
        time.sleep(100)
    world.barrier("never")


CASES: dict[str, Callable[..., Any]] = {
    "fail_on": _fail_on,
    "work_fails": _work_fails,
    "sleep_in_work": _sleep_in_work,
    "sleep_before_collective": _sleep_before_collective,
}


@pytest.mark.parametrize("guilty", [0, 1])
def test_an_exception_on_one_rank_ends_those_in_a_collective_and_those_on_the_store_with_its_words(
    guilty: int,
) -> None:
    with case(3, "fail_on", str(guilty)) as ranks:
        assert ranks.wait(GONE + 10) == [1, 1, 1], ranks.printed()
        for rank in range(3):
            printed = ranks.output(rank).strip()
            assert "Traceback" not in printed, printed
            if rank == guilty:
                assert printed.startswith(f"dist-train: ValueError: planted ({__file__}:"), printed
            else:
                assert f"rank {guilty} failed: ValueError: planted" in printed, ranks.printed()


def test_a_failure_of_rank_0s_work_reaches_the_ranks_that_wait_for_it() -> None:
    with case(3, "work_fails") as ranks:
        assert ranks.wait(GONE + 10) == [1, 1, 1], ranks.printed()
        assert ranks.output(0).strip() == "dist-train: no such file\n  -> give another"
        for rank in (1, 2):
            assert "rank 0 failed: dist_train.errors.DataError: no such file\n  -> give another" in ranks.output(
                rank
            ), ranks.printed()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_those_that_are_in_a_collective_with_it(victim: int, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with case(3, "sleep_before_collective", str(victim), str(ready)) as ranks:
        assert ranks.until(ready.exists)
        time.sleep(0.3)
        ranks.kill([victim])
        codes = ranks.wait(GONE)
        assert codes[victim] == -signal.SIGKILL and all(
            code == 1 for rank, code in enumerate(codes) if rank != victim
        ), ranks.printed()
        for rank in {0, 1, 2} - {victim}:
            assert "the connection to another rank was lost" in ranks.output(rank) and "Traceback" not in ranks.output(
                rank
            ), ranks.printed()


def test_when_rank_0_is_killed_at_its_work_those_that_wait_on_the_store_end(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    with case(3, "sleep_in_work", str(ready)) as ranks:
        assert ranks.until(ready.exists)
        time.sleep(0.3)
        ranks.kill([0])
        assert ranks.wait(GONE) == [-signal.SIGKILL, 1, 1], ranks.printed()
        for rank in (1, 2):
            assert "the connection to another rank was lost" in ranks.output(rank), ranks.printed()


# The successful cases share one start of the ranks.


def _waits_and_broadcasts(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    rounds = [b"", b"x", bytes(range(256)) * 1000]
    for number, data in enumerate(rounds):
        received = world.broadcast_bytes(data if world.is_main else None)
        found[f"broadcast {number}"] = received == data

    found["value"] = world.on_rank_0(lambda: {"rank": world.rank, "list": [1, None, 2.5]}, "making a value")
    found["null"] = world.on_rank_0(lambda: None, "making nothing")
    try:
        world.on_rank_0(lambda: time.sleep(3), "dawdling", 0.5)
    except PeerError as error:
        found["deadline"] = str(error)

    def impossible() -> object:
        return object()

    try:
        world.on_rank_0(impossible, "returning what JSON cannot hold")
    except (PeerError, TypeError) as error:
        found["not json"] = f"{type(error).__name__}: {error}"

    # To first_on_node this looks like two nodes of two ranks each.
    nodes = World(world.rank, world.rank % 2, 4, 2, world.device, 60.0, world.nonce + "nodes", world.store)
    ran: list[int] = []

    def download() -> str:
        ran.append(world.rank)
        return f"by {world.rank}"

    found["first_on_node"] = nodes.first_on_node(download, "downloading")
    found["ran"] = ran
    found["sum"] = world.all_reduce(torch.full((2,), float(world.rank)), "sum").tolist()
    found["max"] = world.all_reduce(torch.full((2,), float(world.rank)), "max").tolist()
    found["gather"] = world.gather({"rank": world.rank})
    # A slow rank may read rank 0's result last; rank 0 must keep the store open until then.
    if not world.is_main:
        time.sleep(2.5)
    found["last"] = world.on_rank_0(lambda: "bye", "leaving")
    return found


def _stray(world: World, value: float) -> str:
    if world.rank == 1:  # as from a model's forward, on this rank alone
        dist.all_reduce(torch.full((1,), value))
        return ""
    try:
        return str(world.stop_agreed())
    except SetupError as error:
        return error.message


@pytest.mark.slow
@pytest.mark.parametrize(("value", "said"), [(1.0, ""), (7.0, "the ranks call different collectives")])
def test_a_collective_on_one_rank_alone_is_no_request_to_stop(value: float, said: str) -> None:
    first, _ = call(2, "tests.distributed.test_world_integration:_stray", value)
    assert first != "True" and said in first


def test_what_ranks_do_together() -> None:
    answers = call(4, "tests.distributed.test_world_integration:_waits_and_broadcasts")
    for rank, found in enumerate(answers):
        assert [found[f"broadcast {number}"] for number in range(3)] == [True] * 3
        assert found["value"] == {"rank": 0, "list": [1, None, 2.5]} and found["null"] is None
        assert found["sum"] == [6.0, 6.0] and found["max"] == [3.0, 3.0]
        assert found["gather"] == [{"rank": each} for each in range(4)]
        assert found["first_on_node"] == f"by {rank - rank % 2}" and found["ran"] == ([rank] if rank % 2 == 0 else [])
        assert found["last"] == "bye"
        if rank == 0:
            assert "deadline" not in found and found["not json"].startswith("TypeError")
        else:
            assert found["deadline"].startswith("rank 0 did not finish (dawdling) within 0.5 s")
            assert found["not json"].startswith("PeerError: rank 0 failed: TypeError")


def _outlive_the_timeout(world: World) -> list[float]:
    import torch.distributed as dist

    def work() -> float:
        # Rank 1 sets the key only after a wait longer than the process group's timeout.
        assert world.store is not None
        while not world.store.check(["waited"]):
            time.sleep(0.05)
        return 1.0

    if world.rank == 1:
        store = world.store
        assert store is not None
        threading.Timer(1.7 * world.timeout, lambda: store.set("waited", "yes")).start()
    value = world.on_rank_0(work, "working for long", 60.0)
    total = world.all_reduce(torch.ones(1), "sum")
    assert dist.is_initialized()
    return [value, float(total)]


@pytest.mark.slow
def test_work_that_outlives_the_process_groups_timeout_kills_nobody() -> None:
    with Ranks(2, ["-m", "tests.distributed.test_world_integration", "--timeout", "3", "outlive"]) as ranks:
        assert ranks.wait(60) == [0, 0], ranks.printed()
        assert "[1.0, 2.0]" in ranks.output(0) and "[1.0, 2.0]" in ranks.output(1)


@pytest.mark.slow
def test_a_rank_that_never_comes_to_a_collective_is_named_as_a_timeout(tmp_path: Path) -> None:
    with Ranks(
        2,
        [
            "-m",
            "tests.distributed.test_world_integration",
            "--timeout",
            "2",
            "sleep_before_collective",
            "1",
            str(tmp_path / "ready"),
        ],
    ) as ranks:
        ranks.until(lambda: ranks.processes[0].poll() is not None, 60)
        assert ranks.processes[0].wait(1) == 1
        assert "another rank did not answer within 2 s" in ranks.output(0) and "Traceback" not in ranks.output(0), (
            ranks.printed()
        )


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "1"}, "RANK is set, but WORLD_SIZE is not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "3"}, "LOCAL_RANK is 3"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, at least 1, not 'two'"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_variables_that_contradict_each_other_are_a_setup_error_before_any_rank_waits(
    variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match=named) as caught, join(RunConfig(device="cpu", timeout=5)):
        pytest.fail("a world of contradictions")
    assert caught.value.exit_code == 78 and caught.value.hint


def test_contradictory_variables_end_the_program_with_78(config: Path, tmp_path: Path) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with train(1, "run", str(config), "--run.dir", str(tmp_path / "run"), environ=variables) as ranks:
        assert ranks.wait(60) == [78], ranks.printed()
        assert "Traceback" not in ranks.output(0)


def test_ranks_that_do_not_come_are_a_setup_error(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dist_train.distributed.process_group._FORMING_SECONDS", 1.0)
    with (
        pytest.raises(SetupError, match=f"2 ranks did not meet at 127.0.0.1:{port}"),
        join(RunConfig(device="cpu", timeout=5)),
    ):
        pytest.fail("a world of one of two ranks")


# Under torchrun.

PLUGIN = """
import dist_train, os, torch
from dist_train.data.splits import Splits
from torch.utils.data import Dataset

class Planted(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        if os.environ.get("RANK") == "1" and torch.is_grad_enabled() and index == int(os.environ["PLANTED"]):
            raise ValueError(f"planted in sample {index}")
        return torch.full((1, 4, 4), index / 64), index % 2

@dist_train.register_dataset("planted")
def planted(data):
    return Splits(Planted(), Planted(), 2, ("a", "b"), (0.5,), (0.5,))
"""
CONFIG = """
run: {name: planted, threads_per_rank: 1, device: cpu}
data: {name: NAME, global_batch_size: 8}
model: {name: mlp, args: {size: 4, hidden: 4}}
stages: [train]
train: {epochs: 1}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG.replace("NAME", "fake"))
    return path


@pytest.mark.slow
def test_under_torchrun_the_failing_rank_is_the_root_cause(tmp_path: Path) -> None:
    (tmp_path / "planted_data.py").write_text(PLUGIN)
    path = tmp_path / "planted.yaml"
    path.write_text(CONFIG.replace("NAME", "planted"))
    arguments = ["run", str(path), "--run.dir", str(tmp_path / "run"), "--import", "planted_data"]
    # The sample of rank 1 at step 3 of epoch 0, so that both ranks are well under way.
    planted = _rank_1s_sample_of_step(3)
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "RANK", "WORLD_SIZE"))
    }
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{tmp_path}", "PLANTED": str(planted)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
        "-m",
        "dist_train",
        *arguments,
    ]
    with subprocess.Popen(
        command,
        env=variables,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        failed_at: list[float] = []
        lines = []
        killer = threading.Timer(120, lambda: os.killpg(process.pid, signal.SIGKILL))
        killer.start()
        for line in process.stdout:
            lines.append(line)
            if "planted in sample" in line and not failed_at:
                failed_at.append(time.monotonic())
        code = process.wait()
        killer.cancel()
    printed = "".join(lines)
    assert code == 1 and failed_at and time.monotonic() - failed_at[0] < GONE, printed
    root = printed[printed.index("Root Cause") :]
    assert "rank      : 1 " in root and f"ValueError: planted in sample {planted}" in root, printed
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert f"planted in sample {planted}" in json.loads((tmp_path / "run" / "status.json").read_text())["error"]


def _rank_1s_sample_of_step(step: int) -> int:
    from dist_train.data.permutation import derive_key
    from dist_train.data.sampler import ElasticDistributedSampler

    sampler = ElasticDistributedSampler(range(64), 2, 1, seed=derive_key("stage", 0, "train"), global_batch_size=8)
    return int(sampler.rank_slice(step).ids[0])


def _main(*arguments: str) -> int:
    timeout = 100.0
    if arguments[0] == "--timeout":
        timeout, arguments = float(arguments[1]), arguments[2:]
    name, *rest = arguments
    try:
        with join(RunConfig(device="cpu", timeout=timeout)) as world:
            print((CASES | {"outlive": _outlive_the_timeout})[name](world, *rest))
    except DistTrainError as error:
        print(f"dist-train: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))


SERVER = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(300)
"""


@pytest.mark.slow
def test_a_store_that_does_not_answer_any_more_is_given_up_where_torch_would_wait_for_minutes() -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            store = TCPStore("127.0.0.1", int(server.stdout.readline()), timeout=timedelta(seconds=5))
            world = World(rank=1, world_size=2, timeout=1.0, store=store)
            assert world.asked(lambda: store.check(["absent"])) is False
            server.send_signal(signal.SIGSTOP)
            with pytest.raises(PeerError, match="does not answer"):
                world._wait("absent", 0, "anything", deadline=600.0)
            assert world.store is None
        finally:
            server.kill()
