"""Ranks that a real mpirun starts: the weights are those behind torchrun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launchers.test_same_weights_integration import OPTIONS, launch, weights
from tests.support.ranks import ROOT
from tests.support.slurm_cluster import SMALL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed"),
]


def mpirun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Two ranks of Open MPI on this machine."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "TORCHELASTIC", "OMPI"))
    }
    return subprocess.run(
        ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", "2", *words],
        env=clean
        | {"PYTHONPATH": str(ROOT), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        | {"OMP_NUM_THREADS": "1"},
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
