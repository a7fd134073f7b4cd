"""Ranks that are really stuck: the run ends in bounded time and names each rank's phase."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from dist_train.config.load import load
from dist_train.distributed.process_group import join
from dist_train.distributed.watchdog.rank_side import watched
from dist_train.distributed.watchdog.stop_signals import listening
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.distributed.watchdog.test_stop_signals_integration import Case
from tests.support.ranks import Ranks

TIMEOUT = 4
WATCHED = ("--watchdog.timeout", str(TIMEOUT))
WHOLE = ("--stages", "[train, ptq, qat, convert, export]", "--convert.deadline", str(TIMEOUT))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def ends(ranks: Ranks) -> None:
    """Checks that all ranks end within the timeout, the promised 20 s from detection, and a margin."""
    began = time.monotonic()
    codes = ranks.wait(TIMEOUT + 20 + 20)
    assert 0 not in codes
    assert time.monotonic() - began < TIMEOUT + 20 + 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hold", "options", "environ", "said"),
    [
        ("forward 1 15 lock", (), {}, "rank 1 is stuck in `forward`, rank 0 waits in `"),
        ("data 1 70 wait", (), {}, "rank 1 is stuck in `data`, rank 0 waits in `"),
        ("evaluate 1 0 lock", (), {}, "rank 1 is stuck in `evaluate`, rank 0 waits in `"),
        ("save 0 1 wait", (), {}, "rank 0 is stuck in `save`, rank 1 waits in `"),
        ("disk 0 8 wait", (), {}, "rank 0 is stuck in `save`, rank 1 waits in `"),
        ("convert 0 0 lock", WHOLE, {"PLAIN": "1"}, "rank 0 is stuck in `convert`, rank 1 waits in `waiting`"),
    ],
)
def test_the_message_names_the_rank_and_the_phase_and_the_stacks_are_kept(
    case: Case, hold: str, options: tuple[str, ...], environ: dict[str, str], said: str
) -> None:
    with case.start(2, hold, *WATCHED, *options, **environ) as ranks:
        case.reached(ranks)
        ends(ranks)
        printed = ranks.printed()
    assert said in printed
    assert printed.count("no progress for") == 1, "one rank says it for all"
    status = read_json(case.run_dir.status)
    assert status["state"] == "failed" and said in status["error"]
    stacks = [(case.run_dir.stuck(0) / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert all("most recent call first" in text for text in stacks)
    if "data" not in hold:  # that one is stuck in a worker
        assert "in hold" in stacks[int(hold.split()[1])], "also where a C call holds the interpreter's lock"


@pytest.mark.slow
@pytest.mark.parametrize(
    "hold",
    [
        *("set-up 0 0 wait", "set-up 1 0 wait", "data 1 70 wait", "forward 0 15 wait"),
        *("save 0 1 wait", "disk 0 1 wait", "exit 0 0 wait"),
    ],
)
def test_a_rank_that_is_slow_is_not_dead(case: Case, hold: str) -> None:
    """One rank takes three times `run.timeout` for work of its own, which is less than `watchdog.timeout`."""
    limit = 3
    with case.start(2, hold, "--run.timeout", str(limit), "--watchdog.timeout", "60") as ranks:
        case.reached(ranks)
        time.sleep(3 * limit)  # the time itself is what is tried
        case.go()
        assert ranks.wait() == [0, 0], ranks.printed()
    assert case.status()["state"] == "done"


@pytest.mark.slow
def test_a_stopped_process_is_named_and_does_not_stay(case: Case) -> None:
    with case.start(2, "forward 1 15 wait", *WATCHED) as ranks:
        case.reached(ranks)
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        ends(ranks)
        assert ranks.processes[1].returncode == -signal.SIGKILL
        assert "rank 1 is stuck in `forward` (the process is stopped: SIGSTOP)" in ranks.printed()


@pytest.mark.slow
def test_a_rank_that_is_frozen_with_its_watcher_is_named_with_its_process(case: Case) -> None:
    """As by the freezer of a container: the others end, and say what they cannot end."""
    with case.start(2, "forward 1 15 wait", *WATCHED) as ranks:
        case.reached(ranks)
        rank = psutil.Process(ranks.processes[1].pid)
        frozen = [*rank.children(recursive=True), rank]
        try:
            for process in frozen:
                process.suspend()
            assert ranks.processes[0].wait(TIMEOUT + 20 + 20) == 1
        finally:
            for process in frozen:
                process.kill()
        printed = ranks.output(0)
    assert f"no report from rank 1 (process {rank.pid} on {socket.gethostname()}): it is gone or frozen" in printed
    assert f"kill -KILL {rank.pid}, on {socket.gethostname()}" in printed


@pytest.mark.slow
def test_a_data_worker_that_is_stuck_does_not_outlive_its_rank(case: Case) -> None:
    with case.start(1, "data 0 70 wait", *WATCHED) as ranks:
        case.reached(ranks)
        ends(ranks)
        assert ranks.until_alone(0), "a process of its group is left"


@pytest.mark.slow
def test_a_job_that_was_suspended_and_goes_on_is_left_alone(case: Case) -> None:
    """Ctrl-Z, or Slurm's gang scheduling, stops all processes of a job, here for longer than the timeout."""
    with case.start(1, "forward 0 15 wait", *WATCHED, "--train.epochs", "2") as ranks:
        case.reached(ranks)
        os.killpg(ranks.processes[0].pid, signal.SIGSTOP)
        time.sleep(2 * TIMEOUT)
        os.killpg(ranks.processes[0].pid, signal.SIGCONT)
        time.sleep(TIMEOUT / 2)
        case.go()
        assert ranks.wait() == [0], ranks.printed()


@pytest.mark.slow
def test_a_run_that_goes_on_slowly_is_left_alone(case: Case) -> None:
    """Each step is well within the timeout; all steps together exceed it."""
    with case.start(1, "forward 0 15 wait", *WATCHED, "--train.epochs", "2") as ranks:
        case.reached(ranks)
        time.sleep(TIMEOUT / 2)
        case.go()
        assert ranks.wait() == [0], ranks.printed()


@pytest.mark.slow
def test_a_rank_that_waits_for_one_that_goes_on_ends_nothing(case: Case) -> None:
    with Ranks(
        2,
        [
            "-m",
            "tests.distributed.watchdog.test_watchdog_integration",
            str(case.config),
            str(case.run_dir.path),
            "goes on",
        ],
    ) as ranks:
        assert ranks.wait(60) == [0, 0], ranks.printed()
        assert "no progress" not in ranks.printed()
        assert "rank 1 asked three times" in ranks.output(0)
    assert not case.run_dir.stuck(0).exists()
    assert len(case.run_dir.questions(0)) <= 1, "what was answered is removed"


@pytest.mark.slow
def test_a_rank_that_went_on_for_long_and_then_is_stuck_is_named(case: Case) -> None:
    with Ranks(
        2,
        [
            "-m",
            "tests.distributed.watchdog.test_watchdog_integration",
            str(case.config),
            str(case.run_dir.path),
            "stays",
        ],
    ) as ranks:
        assert ranks.wait(60) == [1, 1], ranks.printed()
        assert "rank 0 is stuck in `evaluate`, rank 1 waits in `collective`" in ranks.printed()
        assert "no report from" not in ranks.printed()
    assert all((case.run_dir.stuck(0) / f"rank{rank}.txt").stat().st_size for rank in (0, 1))


def main(file: str, folder: str, what: str) -> None:
    """Runs one rank: rank 1 waits in a collective for rank 0, which beats until two questions were asked.

    Then rank 0 joins the collective, or, with "stays", never does.
    """
    config = load(
        file, ["--import", "tests.support.blocking_parts", "--run.dir", folder, "--watchdog.timeout", "1"]
    ).config
    run_dir = RunDir(Path(folder))
    with listening() as stop, watched(config, stop) as heartbeat, join(config.run) as world:
        world.heartbeat, world.stop = heartbeat, stop
        heartbeat.identify(world.rank, 2, 0)
        heartbeat.begin("evaluate")
        while world.rank == 0 and max(run_dir.questions(0), default=-1) < 2:
            heartbeat.enter("evaluate")
            time.sleep(0.05)
        if world.rank == 0:
            print("rank 1 asked three times", flush=True)
        while world.rank == 0 and what == "stays":
            time.sleep(0.05)
        world.barrier("end")


if __name__ == "__main__":
    main(*sys.argv[1:])
