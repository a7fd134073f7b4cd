"""One program behind every launcher: after training, the weights are the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import ROOT
from tests.slurm import SMALL, Cluster

OPTIONS = ("small.yaml", "--strategy", "ddp")


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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_weights_are_the_same_under_torchrun_accelerate_srun_and_sbatch(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    printed = launch(tmp_path, "torchrun", "--nproc-per-node", "2", *OPTIONS, "--run.dir", "torchrun")
    assert "small: 2 ranks" in printed
    logs = sorted((tmp_path / "torchrun" / "logs").glob("*/attempt_0/*/stdout.log"))
    assert [file.parent.name for file in logs] == ["0", "1"], "each rank's output is kept"

    printed = launch(tmp_path, "accelerate", "--nproc-per-node", "2", *OPTIONS, "--run.dir", "accelerate")
    assert "small: 2 ranks" in printed and "[default1]" not in printed

    here, there = (
        ("--local-addr", "127.0.0.1", "--is-host", "true"),
        ("--local-addr", "127.0.0.2", "--is-host", "false"),
    )
    words = (*OPTIONS, "--run.dir", "agents")
    agents = [
        start(tmp_path, "torchrun", "--nodes", "2", "--endpoint", "127.0.0.1", *node, *words) for node in (here, there)
    ]
    assert sum("small: 2 ranks" in finish(agent) for agent in agents) == 1

    command = ("srun", "-N1", "-n2", sys.executable, "-m", "dist_train", "run", *OPTIONS, "--run.dir", "srun")
    answer = cluster.run(*command, cwd=tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr

    for run, more in (("sbatch", []), ("sbatch-tasks", ["--task-per-rank"])):
        done = cluster.launch("--nodes", "2", *more, "--follow", *OPTIONS, "--run.dir", run, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "small: 2 ranks" in done.stdout
        assert done.stdout.count("epoch 2/2") == 1, "rank 0 is shown, once"

    runs = ("torchrun", "accelerate", "agents", "srun", "sbatch", "sbatch-tasks")
    assert len({weights(tmp_path / run) for run in runs}) == 1


@pytest.mark.slow
def test_a_failure_of_the_ranks_is_the_exit_code_of_launch(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    words = ("torchrun", "--nproc-per-node", "2", *OPTIONS, "--train.optim.lr", "1e30")
    assert "not finite" in finish(start(tmp_path, *words), expected=1)
    words = ("torchrun", "--nproc-per-node", "2", *OPTIONS, "--model.args", "{colour: red}")
    assert "colour" in finish(start(tmp_path, *words), expected=78)
