"""Fewer than 8 bits end to end: trained, converted, gated, exported as a program; other formats are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_train.artifact.load import load_artifact
from dist_train.cli import main
from dist_train.run_dir.files import read_json
from tests.support.ranks import train_done
from tests.support.small_runs import Runs

RULES = "[{match: '1', weight: {bits: 4}, activation: {bits: 6}}]"


@pytest.mark.slow
def test_two_ranks_take_four_bits_the_whole_way_to_an_artifact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    run = tmp_path / "run"
    settings = ["--stages", "[train, ptq, qat, convert, export]", "--export.latency_batch_sizes", "[1]"]
    clipped = ["--ptq.ranges", "percentile", "--ptq.percentile", "99.9", "--qat.observer", "min_max"]
    printed = train_done(2, "run", str(runs.config), "--run.dir", str(run), *settings, *clipped, "--qat.rules", RULES)
    assert "int8: its 4 and 6-bit integers are simulated" in printed
    assert "int8: simulates 4 and 6 bits" in printed
    assert "int8 is not timed" in printed
    results = read_json(run / "results.json")
    assert {name: gate["passed"] for name, gate in results["gates"].items()} == dict.fromkeys(
        ("prepare", "gradients", "convert", "artifact"), True
    )
    assert results["models"]["int8"]["simulated_bits"] == [4, 6]
    manifest = read_json(run / "export" / "manifest.json")
    assert manifest["models"]["int8"]["simulated_bits"] == [4, 6]
    model, _ = load_artifact(run / "export")
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 6)
    assert main(["export", str(run), "--format", "onnx"]) == 1
    assert "int8 cannot be written as onnx: its 4 and 6-bit integers are simulated" in capsys.readouterr().err


@pytest.mark.slow
def test_auto_writes_no_format_of_simulated_bits_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    settings = ["--stages", "[ptq, convert, export]", "--export.formats", "[auto]", "--convert.agreement_bound", "0"]
    assert runs("run", *settings, "--export.latency", "false", "--qat.rules", RULES) == 0
    reason = "int8: no format but the program: its 4 and 6-bit integers are simulated"
    assert reason in capsys.readouterr().out
    export = tmp_path / "run" / "export"
    before = {path.name for path in export.iterdir()}
    assert {"model.pt2", "manifest.json"} <= before <= {"model.pt2", "manifest.json", "SHA256SUMS"}
    assert main(["export", str(tmp_path / "run"), "--format", "auto", "--model", "int8"]) == 0
    assert reason in capsys.readouterr().out
    assert {path.name for path in export.iterdir()} == before
