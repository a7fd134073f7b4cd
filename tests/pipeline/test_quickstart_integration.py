"""The quickstart on 1, 2 and 3 ranks has the same samples at every step, the same counts and the same accuracy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dist_train.config.shipped import shipped
from dist_train.run_dir.files import read_json
from dist_train.run_dir.ledger import check, read_steps
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import ROOT, Ranks, train_done
from tests.support.small_runs import run_here

QUICKSTART = str(shipped()["quickstart"])
THREE = pytest.param(3, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Finished runs of the quickstart by world size, each made when it is first asked for; tests only read them."""
    folder = tmp_path_factory.mktemp("quickstart")

    @cache
    def made(world: int) -> Path:
        run, latency = folder / str(world), "true" if world == 2 else "false"
        stages = "[train, ptq, qat, convert, export]" if world > 1 else "[train, qat]"  # one rank shows its samples
        command = ["run", QUICKSTART, "--run.dir", str(run), "--export.latency", latency, "--stages", stages]
        printed = train_done(world, *command)
        if world > 1:
            assert "int8" in printed
            assert "gates passed" in printed
        return run

    return made


def results(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = read_json(RunDir(run).results)
    return value


def global_batches(run: Path) -> dict[tuple[str, int], list[int]]:
    """Returns the sample ids of each step, over all ranks."""
    return {key: sorted(number for line in lines for number in line["ids"]) for key, lines in read_steps(run).items()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, THREE])
def test_every_step_consumes_the_same_samples_at_any_world_size(world: int, run_of: Callable[[int], Path]) -> None:
    one = global_batches(run_of(1))
    assert len(one) == 13 * 23
    assert global_batches(run_of(world)) == one
    assert all(len(lines) == world for lines in read_steps(run_of(world)).values())
    for run in (run_of(1), run_of(world)):
        report = check(run)
        assert report.ok, str(report)
        assert set(report.epochs.values()) == {1437}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, THREE])
def test_int8_is_good_and_close_to_fp32_at_any_world_size(world: int, run_of: Callable[[int], Path]) -> None:
    models = results(run_of(world))["models"]
    assert {figures["count"] for figures in models.values()} == {360}
    assert models["int8"]["top1"] >= 0.95
    assert abs(models["int8"]["top1"] - models["fp32"]["top1"]) <= 0.01
    assert models["int8"]["bytes"] < models["fp32"]["bytes"]
    assert all(gate["passed"] for gate in results(run_of(world))["gates"].values())
    alone = results(run_of(1))["models"]["fake_quant"]["top1"]
    assert abs(models["fake_quant"]["top1"] - alone) <= 0.015


@pytest.mark.timeout(600)
def test_the_run_directory_holds_what_tools_rely_on(run_of: Callable[[int], Path]) -> None:
    run = run_of(2)
    assert read_json(RunDir(run).status) == {
        "state": "done",
        "stage": "export",
        "step": 0,
        "restarts": 0,
        "error": None,
    }
    assert read_json(RunDir(run).environment)["world_size"] == 2
    assert {entry.name for entry in run.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "results.json",
        "checkpoints",
        "export",
        "ledger",
    }
    lines = RunDir(run).metrics.read_text().splitlines()
    assert {"time", "stage", "epoch", "step", "attempt", "loss", "lr", "samples_per_second"} <= set(
        json.loads(lines[0])
    )
    assert set(read_json(run / "export" / "manifest.json")["files"]) == {"model.pt2"}


@pytest.mark.timeout(600)
def test_the_artifact_loads_in_an_isolated_python_and_is_right_on_the_real_digits(
    run_of: Callable[[int], Path], tmp_path: Path
) -> None:
    code = """
import sys, torch
from sklearn.datasets import load_digits
from dist_train import load_artifact
model, manifest = load_artifact(sys.argv[1])
digits = load_digits()
images = torch.tensor(digits.images * 255 / 16).round().clamp(0, 255).float().unsqueeze(1) / 255
mean, std = (torch.tensor(manifest["normalization"][name]).view(-1, 1, 1) for name in ("mean", "std"))
print((model((images - mean) / std).argmax(1) == torch.tensor(digits.target)).float().mean().item())
"""
    isolated = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + code
    answer = subprocess.run(
        [sys.executable, "-I", "-c", isolated, str(run_of(2) / "export")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout.split()[-1]) > 0.97


@pytest.mark.timeout(600)
def test_the_same_command_says_that_the_run_is_done_and_changes_nothing(run_of: Callable[[int], Path]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_of(2).rglob("*")}
    assert "done" in train_done(2, "run", QUICKSTART, "--run.dir", str(run_of(2)))
    assert {path: path.stat().st_mtime_ns for path in run_of(2).rglob("*")} == before


@pytest.mark.timeout(600)
def test_a_change_that_determines_the_result_is_refused_and_another_is_not(
    run_of: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("run", QUICKSTART, "--run.dir", str(run_of(2)))
    assert run_here(*command, "--train.optim.lr", "0.2") == 78
    error = capsys.readouterr().err
    assert "train.optim.lr" in error and "0.1" in error
    assert run_here(*command, "--log.every_steps", "3") == 0
    assert "done" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_evaluate_gives_the_run_s_figures_again_on_another_number_of_ranks(run_of: Callable[[int], Path]) -> None:
    with Ranks(3, ["-m", "dist_train", "evaluate", str(run_of(2))]) as ranks:
        assert ranks.wait() == [0, 0, 0], ranks.printed()
        printed = ranks.output(0)
    models = results(run_of(2))["models"]
    for name in ("fp32", "int8"):
        row = next(line for line in printed.splitlines() if name in line)
        assert f"{models[name]['top1'] * 100:.2f} %" in row
        assert " 360 " in row


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fast_dev_run_tries_every_stage_without_touching_the_run(tmp_path: Path) -> None:
    target = tmp_path / "run"
    quick = ["--run.dir", str(target), "--fast-dev-run", "--export.latency", "false"]
    train_done(2, "run", QUICKSTART, *quick)
    assert not target.exists()
    dev = tmp_path / "run-fast-dev-run"
    stages = results(dev)["stages"]
    assert {name: figures.get("steps") for name, figures in stages.items()} == {
        "train": 2,
        "ptq": None,
        "qat": 2,
        "convert": None,
        "export": None,
    }
    assert results(dev)["gates"]["convert"]["bound"] == results(dev)["gates"]["lowered"]["bound"] == 0.9
    assert run_here("run", QUICKSTART, *quick, "--stages", "[train]") == 0  # starts over, even in a used directory
    assert results(dev)["world_size"] == 1
