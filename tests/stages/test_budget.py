"""Runs in which ptq is within `qat.budget`, or is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.small_runs import Runs

pytestmark = pytest.mark.heavy

SETTINGS = ["--stages", "[train, ptq, qat, convert]", "--train.epochs", "1", "--qat.epochs", "1", "--ptq.samples", "64"]


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    stages = {
        name: {key: value for key, value in stage.items() if key != "seconds"}
        for name, stage in results["stages"].items()
    }
    return {**results, "stages": stages}


def test_within_the_budget_qat_is_left_out_and_ptq_is_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    assert runs("run", *SETTINGS, "--qat.budget", "100") == 0
    results = runs.results("run")
    assert results["stages"]["qat"]["left_out"] and "steps" not in results["stages"]["qat"]
    assert "fake_quant" not in results["models"] and results["models"]["int8"]["count"] == 61
    assert runs.product("run", "qat") == runs.product("run", "ptq")
    printed = capsys.readouterr().out
    assert "within the budget of 100: qat is not needed: skipped" in printed
    assert "qat: left out, as ptq loses" in printed, "the summary has it too"


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "little"), [(8, True), (2, False)])
def test_without_a_budget_ptq_says_what_it_lost_and_where_that_is_little_how_to_leave_qat_out(
    bits: int, little: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    rules = ["--qat.rules", f"[{{match: '*', weight: {{bits: {bits}}}}}]", "--train.epochs", "3"]
    assert runs("run", "--stages", "[train, ptq, qat]", "--qat.epochs", "1", "--ptq.samples", "64", *rules) == 0
    models = runs.results("run")["models"]
    lost = 100 * (models["fp32"]["top1"] - models["ptq"]["top1"])
    assert (lost <= 0.1) == little, "else there is nothing to see"
    line = f"ptq: loses {lost:.2f} points of top1 against fp32"
    hint = "; --qat.budget 0.1 skips qat" if lost <= 0 else "; if that is acceptable, --qat.budget 0.1 skips qat"
    assert f"{line}{hint if little else ''}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_what_was_left_out_stays_so_when_a_run_goes_on(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    drifting = [*SETTINGS, "--qat.budget", "100", "--import", "tests.support.faulty_parts", "--qat.backend", "drifting"]
    assert runs("whole", *drifting, "--convert.agreement_bound", "0") == 0
    assert runs("run", *drifting) == 1, "the gate of convert fails"
    assert runs.checkpoints("run").names() == ["ptq-end", "qat-end", "train-end"]
    assert runs("run", *drifting, "--convert.agreement_bound", "0") == 0
    assert runs.product("run", "convert") == runs.product("whole", "convert")
    assert without_times(runs.results("run")) == without_times(runs.results("whole"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "verdict"),
    [
        (["--qat.budget", "100", "--qat.always", "true"], "not needed, but qat.always is set"),
        (
            ["--qat.budget", "0", "--qat.rules", "[{match: '*', weight: {bits: 2}}]"],
            "beyond the budget of 0: qat is needed",
        ),
    ],
)
def test_qat_trains_where_it_is_asked_for_or_needed(
    settings: list[str], verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    assert runs("run", *SETTINGS[:-2], *settings) == 0
    stage = runs.results("run")["stages"]["qat"]
    assert stage["steps"] == 11 and not stage["left_out"]
    assert verdict in capsys.readouterr().out
