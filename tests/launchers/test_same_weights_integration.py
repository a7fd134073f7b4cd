"""One program behind every launcher: the weights and the artifact are the same bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.network_namespaces import TwoMachines
from tests.support.ranks import ROOT
from tests.support.slurm_cluster import SMALL, Cluster

OPTIONS = ("small.yaml", "--strategy", "ddp")
# All its stages, for fewer epochs, and without what is not in the artifact; it sets the threads of each rank itself.
QUICKSTART = (
    *(str(ROOT / "configs" / "quickstart.yaml"), "--train.epochs", "2", "--qat.epochs", "1"),
    *("--export.latency", "false", "--convert.runtime", "none"),
)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """`dist-train launch ...` on this machine."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC"))}
    return subprocess.Popen(
        [sys.executable, "-m", "dist_train", "launch", *words],
        env=clean | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], expected: int = 0) -> str:
    """Waits for the launch, expects this exit code, and returns what it printed."""
    try:
        printed, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()  # goes on to the agent, which ends the ranks
        raise
    assert process.returncode == expected, printed
    return printed


def launch(folder: Path, *words: str) -> str:
    return finish(start(folder, *words))


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "train-end" / "tensors.safetensors").read_bytes()


def result(run: Path) -> tuple[str, ...]:
    """Of a whole run: hashes of the weights after train, of those after qat with their ranges, and of the artifact."""
    files = (
        *(run / "checkpoints" / f"{stage}-end" / "tensors.safetensors" for stage in ("train", "qat")),
        run / "export" / "model.pt2",
    )
    return tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_s_weights_and_artifact_are_the_same_behind_every_launcher(
    cluster: Cluster, machines: TwoMachines, tmp_path: Path
) -> None:
    printed = launch(tmp_path, "torchrun", "--nproc-per-node", "2", *QUICKSTART, "--run.dir", "torchrun")
    assert "quickstart: 2 ranks" in printed
    logs = sorted((tmp_path / "torchrun" / "logs").glob("*/attempt_0/*/stdout.log"))
    assert [file.parent.name for file in logs] == ["0", "1"], "each rank's output is kept"

    words = ("--nproc-per-node", "2", *QUICKSTART, "--run.dir", "accelerate", "--strategy", "ddp")
    printed = launch(tmp_path, "accelerate", *words)
    assert "quickstart: 2 ranks" in printed and "[default1]" not in printed

    nodes = []
    for machine in machines:
        meet = (
            "--nodes",
            "2",
            "--endpoint",
            machines.first.address,
            "--is-host",
            str(machine is machines.first).lower(),
        )
        nodes.append(machine.launch(*meet, *QUICKSTART, "--run.dir", "machines", cwd=tmp_path))
    assert machines.codes(*nodes, deadline=240) == [0, 0], machines.printed()
    assert [machine.printed().count("quickstart: 2 ranks") for machine in machines] == [1, 0]

    command = ("srun", "-N1", "-n2", sys.executable, "-m", "dist_train", "run", *QUICKSTART, "--run.dir", "srun")
    answer = cluster.run(*command, cwd=tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr

    done = cluster.launch("--nodes", "2", "--follow", *QUICKSTART, "--run.dir", "sbatch", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "quickstart: 2 ranks" in done.stdout
    assert done.stdout.count("train: epoch 2/2") == 1, "rank 0 is shown, once"

    runs = ("torchrun", "accelerate", "machines", "srun", "sbatch")
    results = {run: result(tmp_path / run) for run in runs}
    assert len(set(results.values())) == 1, results


@pytest.mark.slow
def test_a_task_for_each_rank_trains_the_weights_of_an_agent_on_each_node(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    for run, more in (("agents", []), ("tasks", ["--task-per-rank"])):
        done = cluster.launch("--nodes", "2", *more, "--follow", *OPTIONS, "--run.dir", run, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "small: 2 ranks" in done.stdout
        assert done.stdout.count("epoch 2/2") == 1, "rank 0 is shown, once"
    assert weights(tmp_path / "agents") == weights(tmp_path / "tasks")


@pytest.mark.slow
def test_a_failure_of_the_ranks_is_the_exit_code_of_launch(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    words = ("torchrun", "--nproc-per-node", "2", *OPTIONS, "--train.optim.lr", "1e6")
    assert "not finite" in finish(start(tmp_path, *words), expected=1)
    words = ("torchrun", "--nproc-per-node", "2", *OPTIONS, "--model.args", "{colour: red}")
    assert "colour" in finish(start(tmp_path, *words), expected=78)
