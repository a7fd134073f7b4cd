"""Runs whose directory is at an object store, before a real S3 server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dist_train.artifact.load import load_artifact
from dist_train.cli.program import main
from dist_train.config.load import load
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.store import Store
from tests.support.s3_server import S3, _s3_of_module, another_machine, s3
from tests.support.small_runs import Runs, run_here

__all__ = ["_s3_of_module", "s3"]
pytestmark = pytest.mark.heavy

EVERY = ("--checkpoint.every_steps", "5", "--debug.ledger", "true")


def _bytes_of(folder: Path) -> dict[str, bytes]:
    newest = CheckpointFolder(folder / "checkpoints").latest
    assert newest is not None
    tensors = (folder / "checkpoints" / newest / "tensors.safetensors").read_bytes()
    lines = [json.loads(line) for line in (folder / "ledger" / "rank0.jsonl").read_text().splitlines()]
    ids = {(line["epoch"], line["step"]): line["ids"] for line in lines}
    return {"tensors": tensors, "ids": json.dumps(sorted(ids.items())).encode()}


def _at(s3: S3, runs: Runs, name: str, *options: str, at: int | None = None) -> int:
    return runs("", "--run.dir", s3.address(name), *EVERY, *options, interrupt_at=at)


def _copy(runs: Runs, address: str) -> Path:
    return load(runs.config, ["--run.dir", address]).config.run_dir


def test_another_machine_goes_on_as_if_nothing_had_happened(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    assert runs("whole", *EVERY, "--task.name", "interruptible") == 0
    assert _at(s3, runs, "run", at=17) == -1
    another_machine(monkeypatch, tmp_path / "other")
    assert _at(s3, runs, "run", "--task.name", "interruptible") == 0
    assert "resuming (attempt 1)" in capsys.readouterr().out
    assert _bytes_of(_copy(runs, s3.address("run"))) == _bytes_of(tmp_path / "whole")
    another_machine(monkeypatch, tmp_path / "third")
    assert _at(s3, runs, "run", "--task.name", "interruptible") == 0
    assert "this run is done" in capsys.readouterr().out
    assert json.loads(s3.store("run").read("status.json") or b"")["state"] == "done"


@pytest.mark.slow
def test_a_store_that_is_away_for_a_while_costs_nothing(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    assert _at(s3, runs, "away", at=8) == -1
    s3.way.let(12)  # it is taken and claimed, then the connections are cut
    assert _at(s3, runs, "away", "--task.name", "interruptible", "--checkpoint.retry", "0") == 1
    said = capsys.readouterr().err
    assert "the run goes on, and later checkpoints try again" in said
    assert "all of the run is in" in said
    s3.way.let()
    # Its claim could not be given back, and this process lives on.
    s3.store("away").remove(name for name in s3.store("away").sizes() if name.startswith(".owner-"))
    # What is at the store is older, and whole.
    another_machine(monkeypatch, tmp_path / "other")
    assert runs("whole", *EVERY, "--task.name", "interruptible") == 0
    assert _at(s3, runs, "away", "--task.name", "interruptible") == 0
    assert _bytes_of(_copy(runs, s3.address("away"))) == _bytes_of(tmp_path / "whole")


def test_without_a_way_nothing_begins(s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(tmp_path)
    s3.way.let(0)
    assert _at(s3, runs, "none") == 1
    said = capsys.readouterr().err
    assert f"{s3.address('none')} could not be listed" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://bucket", "names no folder in a bucket"),
        ("s4://bucket/x", "s4:// is no protocol of fsspec"),
        ("memory://bucket/x", "does not outlive this process"),
        ("s3://key:secret@bucket/x", "holds a name or a password"),
        ("s3://bucket/a/../b", "names no folder in a bucket"),
        ("s3://bucket/a?b", "holds '?'"),
        ("s3:/bucket/x", "--run.dir s3://bucket/x"),
        ("abfs://container/x", "needs a library that is not installed"),
    ],
)
def test_an_address_that_cannot_be_a_run_is_a_mistake_of_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str, said: str
) -> None:
    assert Runs(tmp_path)("", "--run.dir", address) == 78
    error = capsys.readouterr().err
    assert said in error
    assert "run.dir" in error


@pytest.mark.parametrize("key", ["run.spool", "data.root", "data.cache_dir", "model.init_from", "train.extend_from"])
def test_a_setting_that_takes_folders_only_says_so_of_an_address(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    assert Runs(tmp_path)("run", f"--{key}", "s3://bucket/other") == 78
    assert f"{key}: s3://bucket/other is an address at a store" in capsys.readouterr().err.replace(f" (--{key})", "")


def test_an_array_of_jobs_at_an_address_is_refused_before_there_is_a_script(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--dry-run", "--sbatch.array", "0-3", "quickstart", "--run.dir", "s3://bucket/x")
    assert main(["launch", "slurm", *words]) == 78
    said = capsys.readouterr()
    assert "cannot share one address, s3://bucket/x" in said.err
    assert said.out == ""


def test_a_folder_may_be_named_by_file(tmp_path: Path) -> None:
    assert Runs(tmp_path)("", "--run.dir", f"file://{tmp_path}/named", "--train.epochs", "1") == 0
    assert (tmp_path / "named" / "results.json").is_file()


def test_a_fast_development_run_has_a_place_of_its_own(s3: S3, tmp_path: Path) -> None:
    assert _at(s3, Runs(tmp_path), "dev", "--fast-dev-run") == 0
    assert s3.store("dev").sizes() == {}
    assert "results.json" in s3.store("dev-fast-dev-run").sizes()


@pytest.mark.slow
def test_verbs_about_a_finished_run_take_its_address(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    stages = ("--stages", "[train, qat, convert, export]", "--train.epochs", "1", "--qat.epochs", "1")
    loose = ("--convert.agreement_bound", "0.5", "--qat.backend", "fx")
    assert _at(s3, runs, "done", *stages, *loose) == 0
    address = s3.address("done")
    another_machine(monkeypatch, tmp_path / "other")
    capsys.readouterr()
    assert run_here("evaluate", address, "--json") == 0
    assert json.loads(capsys.readouterr().out)["models"]["int8"]["count"] == 61
    assert run_here("ledger", address) == 0
    assert run_here("report", address) == 0
    assert "report/report.html" in s3.store("done").sizes()
    assert run_here("export", address, "--format", "onnx", "--model", "fp32") == 0
    assert any(name.endswith(".onnx") for name in s3.store("done").sizes())
    shutil.rmtree(tmp_path / "other")
    for place in (address, f"{address}/export"):
        _, manifest = load_artifact(place)
        assert manifest["default"] == "int8"
    assert run_here("predict", f"{address}/nothing", "x.png") == 1
    assert "there is no artifact at" in capsys.readouterr().err


def test_an_address_of_nothing_is_no_run(s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("report", s3.address("nothing")) == 78
    assert s3.address("nothing") in capsys.readouterr().err
    assert Store(s3.address("nothing")).sizes() == {}
