"""accelerate launch as users type it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import ROOT
from tests.support.slurm_cluster import SMALL


@pytest.mark.slow
def test_an_accelerate_launch_that_starts_one_process_for_two_ends_with_what_to_type(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER_"))}
    words = ("--cpu", "--num_processes", "2", "-m", "dist_train", "run", "small.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words],
        env=clean | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "accelerate was asked for several processes and started this one alone" in done.stderr
    assert "dist-train launch accelerate --nproc-per-node N" in done.stderr
    assert not (tmp_path / "runs").exists()
