"""Ranks that a real mpirun starts: the weights are those behind torchrun."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_train.errors import EXIT_PREEMPTED
from tests.launchers.test_same_weights_integration import OPTIONS, launch, weights
from tests.support.ranks import ROOT
from tests.support.slurm_cluster import SMALL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed"),
]


MPIRUN = ("mpirun", "--oversubscribe", "--bind-to", "none", "-n", "2")


def environ() -> dict[str, str]:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC", "OMPI"))
    }
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return clean | allowed | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def mpirun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Two ranks of Open MPI on this machine."""
    return subprocess.run(
        [*MPIRUN, *words],
        env=environ(),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_mpirun_s_ranks_train_the_weights_of_torchrun_s(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    launch(tmp_path, "torchrun", "--nproc-per-node", "2", *OPTIONS, "--run.dir", "torchrun")
    done = mpirun(tmp_path, sys.executable, "-m", "dist_train", "run", *OPTIONS, "--run.dir", "mpirun")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("small: 2 ranks") == 1, "one run, not two in one folder"
    assert weights(tmp_path / "mpirun") == weights(tmp_path / "torchrun")


def test_ranks_that_cannot_know_where_to_meet_write_nothing(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    unnamed = ("env", "-u", "PMIX_NAMESPACE", "-u", "OMPI_MCA_ess_base_jobid")
    done = mpirun(tmp_path, *unnamed, sys.executable, "-m", "dist_train", "run", *OPTIONS, "--run.dir", "run")
    assert done.returncode == 78, done.stdout + done.stderr
    assert "mpirun -x MASTER_PORT=29500" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_sigusr2_to_mpirun_saves_and_ends_with_75(tmp_path: Path) -> None:
    """SIGTERM would not: Open MPI kills its ranks a second after it."""
    (tmp_path / "small.yaml").write_text(SMALL.replace("epochs: 2", "epochs: 100000") + "compile: false\n")
    words = [*MPIRUN, sys.executable, "-m", "dist_train", "run", "small.yaml", "--run.dir", "run"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(
            words, env=environ(), cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            wait_for(lambda: metrics.is_file() and '"loss"' in metrics.read_text(), process)
            process.send_signal(signal.SIGUSR2)
            assert process.wait(120) == EXIT_PREEMPTED, (tmp_path / "out").read_text()
        finally:
            process.kill()
            process.wait()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "preempted"
    assert (tmp_path / "run" / "checkpoints" / "latest.json").is_file()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
