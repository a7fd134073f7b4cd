"""A real Slurm of four virtual nodes: ranks by srun, batch jobs, requeued jobs, and nothing left after scancel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_train.cluster.slurm_lists import parse_hostlist
from tests.support import slurm_cluster as slurm
from tests.support.ranks import ROOT
from tests.support.slurm_cluster import SMALL, Cluster

STAND_IN = str(Path(__file__).parent / "stand_in_python")
DETECT = (
    "import dataclasses, json, os;"
    "from dist_train.cluster.slurm_lists import show_hostnames; from dist_train.cluster.rank_plan import detect;"
    "print(json.dumps(dataclasses.asdict(detect(os.environ, show_hostnames))))"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    return tmp_path


def status(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "status.json").read_text())
    return found


def test_host_lists_are_read_as_this_slurm_reads_them(cluster: Cluster) -> None:
    for text in ("gpu[01-03,7],login1", "r[1-2]n[01-02]", "n[008-010],a.b.c", "127.0.0.[1-4]"):
        assert cluster.run("scontrol", "show", "hostnames", text).stdout.split() == parse_hostlist(text)


def test_each_task_of_an_uneven_step_knows_its_place(cluster: Cluster, tmp_path: Path) -> None:
    command = (
        "srun",
        "-N2",
        "-n5",
        "--distribution=arbitrary",
        "-w",
        "127.0.0.2,127.0.0.2,127.0.0.2,127.0.0.3,127.0.0.3",
    )
    answer = cluster.run(*command, sys.executable, "-c", DETECT, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    plans = sorted((json.loads(line) for line in answer.stdout.splitlines()), key=lambda plan: plan["rank"])
    assert [(plan["rank"], plan["local_rank"], plan["local_world_size"]) for plan in plans] == [
        (0, 0, 3),
        (1, 1, 3),
        (2, 2, 3),
        (3, 0, 2),
        (4, 1, 2),
    ]
    assert {(plan["source"], plan["world_size"], plan["master_addr"]) for plan in plans} == {("slurm", 5, "127.0.0.2")}
    assert len({plan["master_port"] for plan in plans}) == 1


def test_tasks_dealt_out_in_turn_are_refused_with_78(cluster: Cluster, folder: Path) -> None:
    command = ("srun", "-N2", "-n4", "--distribution=cyclic", sys.executable, "-m", "dist_train", "run", "small.yaml")
    answer = cluster.run(*command, cwd=folder)
    assert answer.returncode == 78
    assert "srun --distribution=block" in answer.stderr and "Traceback" not in answer.stderr
    assert not (folder / "runs").exists()


def test_a_job_with_a_wrong_configuration_ends_with_78_and_is_not_requeued(cluster: Cluster, folder: Path) -> None:
    script = cluster.launch("--nodes", "2", "--dry-run", "small.yaml", cwd=folder).stdout
    (folder / "small.yaml").write_text(SMALL.replace("epochs: 2", "epochs: none"))  # between submission and start
    job = cluster.ended(number := cluster.submit(script, folder))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "78:0", "0")
    assert "train.epochs" in cluster.output(number)
    assert not (folder / "runs").exists()


def planned(cluster: Cluster, folder: Path, plan: str, *options: str, run: str = "runs/small") -> str:
    """The script of a job that goes as `plan` says."""
    settings = ("--env", f"PLANNED={plan}", "--env", f"REAL_PYTHON={sys.executable}", "--python", STAND_IN)
    launched = cluster.launch(
        "--task-per-rank", *settings, *options, "--dry-run", "small.yaml", "--run.dir", run, cwd=folder
    )
    assert launched.returncode == 0, launched.stderr
    return launched.stdout


def attempts(run: Path) -> list[str]:
    return (run / "attempts").read_text().splitlines()


@pytest.mark.slow
def test_a_preempted_job_is_requeued_while_it_makes_progress_and_not_too_often(cluster: Cluster, folder: Path) -> None:
    cases = [
        ("saved,saved,done", "3", 3, "done, srun returned 0"),
        ("saved,lost,done", "3", 2, "not requeued: no checkpoint since"),
        ("saved,saved,done", "1", 2, "not requeued: it was 1 times already"),
    ]
    numbers = []
    for case, (plan, requeues, _, _) in enumerate(cases):
        script = planned(cluster, folder, plan, "--requeues", requeues, run=f"run{case}")
        numbers.append(cluster.submit(script, folder))
    for case, (plan, _, made, said) in enumerate(cases):
        job = cluster.ended(numbers[case])
        run, output = folder / f"run{case}", cluster.output(numbers[case])
        assert [line.split()[0] for line in attempts(run)] == plan.split(",")[:made], output
        assert said in output
        assert all(f"attempt {attempt} was" in output for attempt in range(made)), "the output is appended"
        finished = ("COMPLETED", "0:0") if status(run)["state"] == "done" else ("FAILED", "75:0")
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == (*finished, str(made - 1))


@pytest.mark.slow
def test_a_signal_before_the_end_becomes_a_stop_file_that_the_next_attempt_does_not_see(
    cluster: Cluster, folder: Path
) -> None:
    run = folder / "runs" / "small"
    number = cluster.submit(planned(cluster, folder, "stopping,done"), folder)
    cluster.until((run / "status.json").exists, 120, lambda: cluster.output(number))
    cluster.run("scancel", "--batch", "--signal=USR2", number)
    assert cluster.ended(number)["JobState"] == "COMPLETED"
    assert "asking the ranks to stop (USR2)" in cluster.output(number)
    assert attempts(run) == ["stopping no STOP", "done no STOP"]


@pytest.mark.slow
def test_a_signal_while_the_configuration_is_checked_is_no_reason_to_fail(cluster: Cluster, folder: Path) -> None:
    check = folder / "check"
    number = cluster.submit(planned(cluster, folder, "done", "--env", f"HELD_CHECK={check}"), folder)
    cluster.until(check.exists, 120, lambda: cluster.output(number))
    cluster.run("scancel", "--batch", "--signal=USR2", number)
    Path(f"{check}.go").touch()
    job = cluster.ended(number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), cluster.output(number)
    assert "asking the ranks to stop (USR2)" in cluster.output(number)
    assert attempts(folder / "runs" / "small") == ["done no STOP"]


def test_scancel_during_a_save_does_not_bring_the_job_back(cluster: Cluster, folder: Path) -> None:
    run = folder / "runs" / "small"
    number = cluster.submit(planned(cluster, folder, "stopping,done"), folder)
    cluster.until((run / "status.json").exists, 120, lambda: cluster.output(number))
    cluster.run("scancel", number)
    assert cluster.ended(number)["JobState"] == "CANCELLED"
    assert len(attempts(run)) == 1
    assert "not requeued: the job was cancelled" in cluster.output(number)
    assert cluster.processes("stand_in_python") == {}


@pytest.mark.slow
def test_scancel_leaves_no_orphan_of_a_job_that_trains(cluster: Cluster, folder: Path) -> None:
    words = ("--nodes", "2", "--nproc-per-node", "2", "--submit", "small.yaml", "--train.epochs", "100000")
    number = cluster.launch(*words, cwd=folder).stdout.strip()
    metrics = folder / "runs" / "small" / "metrics.jsonl"
    cluster.until(lambda: metrics.exists() and metrics.stat().st_size > 0, 200, lambda: cluster.output(number))
    assert len(cluster.processes("-m dist_train run", "small.yaml")) >= 4
    cluster.run("scancel", number)
    assert cluster.ended(number)["JobState"] == "CANCELLED"
    cluster.until(lambda: cluster.processes("small.yaml") == {}, 60, lambda: str(cluster.processes("small.yaml")))


@pytest.mark.slow
def test_a_job_that_fails_at_once_is_not_requeued(cluster: Cluster, folder: Path) -> None:
    cases = [("--train.optim.lr=1e6", 1, "is not finite"), ("--model.args={colour: red}", 78, "model.args")]
    for wrong, code, said in cases:  # the second is a mistake that only a rank finds, whose 78 torchrun turns into 1
        done = cluster.launch("--nodes", "2", "--follow", "small.yaml", "--run.dir", f"run{code}", wrong, cwd=folder)
        assert done.returncode == code, done.stdout + done.stderr
        number, _, output = done.stdout.partition("\n")
        assert said in output and "dist-train: failed" in output
        job = cluster.ended(number)
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", f"{code}:0", "0")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_ready_batch_file_takes_the_quickstart_all_the_way_on_two_nodes_with_two_ranks_each(
    cluster: Cluster, tmp_path: Path
) -> None:
    quickstart = (ROOT / "configs" / "quickstart.yaml").read_text()
    fewer = quickstart.replace("epochs: 10", "epochs: 2").replace("epochs: 3", "epochs: 1")
    assert fewer.count("epochs: 2\n") == fewer.count("epochs: 1\n") == 1
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text(fewer + "export: {latency: false}\n")
    number = cluster.submit((ROOT / "launch" / "slurm.sbatch").read_text(), tmp_path)
    job = cluster.ended(number)
    assert (job["JobState"], job["NumNodes"]) == ("COMPLETED", "2"), cluster.output(number)
    run = tmp_path / "runs" / "quickstart"
    assert status(run)["state"] == "done"
    results = json.loads((run / "results.json").read_text())
    assert results["world_size"] == 4
    assert results["models"]["int8"]["count"] == 360 and all(gate["passed"] for gate in results["gates"].values())
    assert (run / "export" / "model.pt2").exists()
    assert json.loads((run / "environment.json").read_text())["local_world_size"] == 2


KILLED = r"""
import sys
from pathlib import Path
from tests.support.slurm_cluster import Cluster
with Cluster() as cluster:
    folder = Path(sys.argv[1])
    number = cluster.submit("#!/bin/bash\nsrun sleep 1000\n", folder, "--nodes=2")
    cluster.until(lambda: len(cluster.processes("/sleep 1000")) >= 2, 120)
    print(cluster.dir, flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_a_pytest_that_is_killed_leaves_nothing_of_its_slurm_behind(tmp_path: Path) -> None:
    reason = slurm.why_not()
    if reason is not None:
        pytest.skip(reason)
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert {"munged", "slurmctld", "slurmd", "sleep"} <= {
            Path(line.split()[0]).name.rstrip(":") for line in slurm.processes_of(folder).values()
        }
        process.kill()
    end = time.monotonic() + 60
    while (slurm.processes_of(folder) or folder.exists()) and time.monotonic() < end:
        time.sleep(0.1)
    assert slurm.processes_of(folder) == {} and not folder.exists()
