"""QAT selects its checkpoint by the metrics of the converted model, not of the simulation."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.support.one_net_all_backends  # noqa: F401 (registers)
from tests.support.faulty_backends import WorseEachTime
from tests.support.small_runs import STEPS, Runs

QAT = [
    *("--model.name", "stub_net", "--model.args", "{}", "--ptq.samples", "64", "--stages", "[train, qat]"),
    *("--train.epochs", "5", "--train.optim.lr", "0.2", "--qat.epochs", "4", "--qat.optim.lr", "0.02"),
    *("--qat.select", "best", "--qat.select_by", "int8_loss"),
]


def int8_losses(runs: Runs, name: str) -> list[float]:
    return [line["eval_int8_loss"] for line in runs.metrics(name) if "eval_int8_loss" in line]


@pytest.mark.slow
def test_the_epoch_that_is_best_as_int8_is_handed_on_and_patience_counts_it(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    WorseEachTime.conversions = 0
    spoiled = ["--qat.backend", "worse_each_time", "--qat.early_stopping", "{patience: 2}"]
    assert runs("run", *QAT, *spoiled) == 0
    stage, models = runs.results("run")["stages"]["qat"], runs.results("run")["models"]
    losses = int8_losses(runs, "run")
    assert len(losses) == 3 and stage["stopped_early"] and stage["steps"] == 3 * STEPS
    assert stage["selected"] == {"step": STEPS, "epoch": 1, "by": "int8_loss", "value": min(losses)}
    assert losses[0] == min(losses) and losses[1] > losses[0] + 0.2
    assert models["fake_quant"].keys() == {"top1", "top5", "loss", "count"}


@pytest.mark.slow
def test_an_interrupted_selection_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    settings = [*QAT, "--qat.backend", "fx", "--task.name", "interruptible"]
    assert runs("whole", *settings) == 0
    assert runs("broken", *settings, interrupt_at=7 * STEPS + 3) == -1
    assert runs("broken", *settings) == 0
    assert runs.product("broken", "qat") == runs.product("whole", "qat")
    assert int8_losses(runs, "broken") == int8_losses(runs, "whole") and len(int8_losses(runs, "whole")) == 4


def test_int8_is_known_to_qat_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(tmp_path)
    assert runs("run", "--train.select_by", "int8_top1") == 78
    assert "the metrics are top1, top5, loss\n" in capsys.readouterr().err
