"""Slurm jobs whose run is at an object store: stopped and requeued, on two nodes with one working copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.s3_server import S3, _s3_of_module, s3
from tests.support.slurm_cluster import SMALL, Cluster

__all__ = ["_s3_of_module", "s3"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_is_stopped_is_requeued_and_ends_at_the_store(cluster: Cluster, s3: S3, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL.replace("epochs: 2", "epochs: 120") + "debug: {ledger: true}\n")
    words = ["--nodes", "2", "--partition", "low", "--submit"]
    for name, value in s3.environ.items():
        words += ["--env", f"{name}={value}"]
    place = ("--run.dir", s3.address("job"), "--run.spool", str(tmp_path / "spool"))
    launched = cluster.launch(*words, "small.yaml", *place, cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr
    number = launched.stdout.strip()

    def status() -> dict[str, object]:
        found: dict[str, object] = json.loads(s3.store("job").read("status.json") or b'{"step": 0}')
        return found

    cluster.until(
        lambda: s3.store("job").read("checkpoints/latest.json") is not None, 200, lambda: cluster.output(number)
    )
    cluster.run("scancel", "--batch", "--signal=USR2", number)
    job = cluster.ended(number, 400)
    said = cluster.output(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), said
    assert "asking the ranks to stop (USR2)" in said
    assert "resuming (attempt 1)" in said
    assert (status()["state"], status()["restarts"]) == ("done", 1)
    assert "results.json" in s3.store("job").sizes()


@pytest.mark.slow
def test_an_array_is_refused(cluster: Cluster, s3: S3, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    script = cluster.launch("--dry-run", "small.yaml", "--run.dir", s3.address("array"), cwd=tmp_path).stdout
    number = cluster.submit(script, tmp_path, "--array=0")
    job = cluster.ended(number)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "78:0")
    assert "cannot share one address" in cluster.output(number)
