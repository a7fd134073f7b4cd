"""Tests early stopping: results, ledger and schedule, and resumption after interruptions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dist_train.run_dir.ledger import check
from tests.support.small_runs import STEPS, Runs

# At this rate nothing improves, so the first evaluation is the best.
STUCK = ["--train.optim.lr", "1e-12", "--train.epochs", "9", "--train.early_stopping", "{patience: 2}"]


def test_a_stage_that_stops_early_says_so_and_its_steps_are_those_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    assert runs("run", *STUCK, "--debug.ledger", "true", "--train.select", "best") == 0
    printed = capsys.readouterr().out
    stage = runs.results("run")["stages"]["train"]
    assert (stage["steps"], stage["epochs"], stage["stopped_early"]) == (3 * STEPS, 3, True)
    assert stage["selected"] == {
        "step": STEPS,
        "epoch": 1,
        "by": "top1",
        "value": runs.results("run")["models"]["fp32"]["top1"],
    }
    assert printed.count("train: stopped early after epoch 3/9: top1 has not improved on ") == 1
    assert "of epoch 1 for 2 evaluations" in printed
    assert check(tmp_path / "run").ok and len(check(tmp_path / "run").epochs) == 3
    rates = [line["lr"] for line in runs.metrics("run") if "lr" in line]
    planned = [1e-12 * (1 + math.cos(math.pi * step / (9 * STEPS))) / 2 for step in range(3 * STEPS)]
    assert rates == pytest.approx(planned, rel=1e-6), "the schedule is that of all nine epochs"


@pytest.mark.parametrize("interrupt_at", [STEPS + 3, 3 * STEPS - 1])
@pytest.mark.slow
def test_patience_goes_on_where_an_interruption_left_it(tmp_path: Path, interrupt_at: int) -> None:
    runs = Runs(tmp_path)
    settings = [*STUCK, "--task.name", "interruptible", "--checkpoint.every_steps", "4"]
    assert runs("whole", *settings) == 0
    assert runs("broken", *settings, interrupt_at=interrupt_at) == -1
    assert runs("broken", *settings) == 0
    assert runs.results("broken")["stages"]["train"]["steps"] == 3 * STEPS
    assert runs.product("broken") == runs.product("whole")


def test_a_stage_that_improves_to_the_end_has_not_stopped(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    assert runs("run", "--train.early_stopping", "{patience: 1}", "--train.select_by", "loss") == 0
    stage = runs.results("run")["stages"]["train"]
    assert (stage["steps"], stage["epochs"], stage["stopped_early"]) == (3 * STEPS, 3, False)


@pytest.mark.slow
def test_qat_stops_early_too_and_its_model_is_that_of_the_best_epoch(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    settings = ["--stages", "[train, qat]", "--train.epochs", "1", "--qat.epochs", "8", "--qat.optim.lr", "1e-12"]
    settings += [
        "--qat.early_stopping",
        "{patience: 1, min_delta: 0.5}",
        "--qat.select",
        "best",
        "--qat.select_by",
        "loss",
    ]
    assert runs("run", *settings) == 0
    results = runs.results("run")
    assert (results["stages"]["qat"]["steps"], results["stages"]["qat"]["stopped_early"]) == (2 * STEPS, True)
    evaluated = [line["eval_loss"] for line in runs.metrics("run") if "eval_loss" in line and line["stage"] == "qat"]
    assert len(evaluated) == 2 and results["models"]["fake_quant"]["loss"] == min(evaluated)
