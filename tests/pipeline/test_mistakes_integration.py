"""Users' mistakes end before training, with a hint what to type, or give one warning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_train
from tests.support.small_runs import Runs


class Zeros(torch.utils.data.Dataset[Any]):
    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 8, 8), index / 40), index % 6


@dist_train.register_dataset("zeros")
def zeros(data: dist_train.DataConfig) -> dist_train.Splits:
    return dist_train.Splits(Zeros(data.args["train"]), Zeros(data.args["eval"]), 6, tuple("abcdef"), (), ())


def dataset(train: int, evaluation: int) -> list[str]:
    return ["--data.name", "zeros", "--data.args", f"{{train: {train}, eval: {evaluation}}}"]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (
            ["--train.select_by", "accuracy"],
            ["train.select_by: classification has no metric 'accuracy'", "the metrics are top1, top5, loss"],
        ),
        (["--train.early_stopping", "{patience: 1}", "--train.select_by", "count"], ["no metric 'count'"]),
        (
            ["--log.epoch_format", "'{acc:.2f}'", "--train.select_by", "top2"],
            ["2 mistakes", "log.epoch_format: has no field 'acc'", "stage, epoch, epochs, top1", "no metric 'top2'"],
        ),
        (["--log.epoch_format", "'{stage:.2f}'"], ["log.epoch_format: cannot be formatted"]),
        (["--profile.steps", "[5, 5]"], ["profile.steps", "[5, 5) holds no step", "--profile.steps '[5, 6]'"]),
        (["--profile.steps", "[20, 10]"], ["[20, 10) holds no step", "--profile.steps '[10, 20]'"]),
    ],
)
def test_wrong_names_are_refused_before_anything_is_written(
    options: list[str], messages: list[str], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs("run", *options) == 78
    printed = capsys.readouterr().err
    assert all(message in printed for message in messages), printed
    assert not (tmp_path / "run").exists()


def test_a_metric_that_only_more_classes_have_is_refused_before_training(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four = "{num_train: 40, num_eval: 20, num_classes: 4, channels: 1, height: 8, width: 8}"
    assert runs("run", "--data.args", four, "--train.select_by", "top5") == 78
    assert "no metric 'top5'" in (printed := capsys.readouterr().err) and "the metrics are top1, loss" in printed
    assert not runs.metrics("run")


@pytest.mark.parametrize(
    ("train", "evaluation", "what"),
    [(40, 0, "evaluate: Splits.eval is empty"), (0, 40, "train on: Splits.train is empty")],
)
def test_an_empty_split_is_an_error(
    train: int, evaluation: int, what: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs("run", *dataset(train, evaluation)) == 1
    assert f"the dataset has nothing to {what}" in capsys.readouterr().err


def test_a_head_of_other_classes_than_the_data_is_an_error(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs("run", "--model.args", "{size: 8, num_classes: 12}") == 1
    assert "the data has 6 classes" in capsys.readouterr().err


def test_the_rate_is_scaled_by_the_base_batch_size_and_that_is_said(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled = [
        "--train.optim",
        "{lr: 0.1, base_batch_size: 5}",
        "--train.schedule.name",
        "constant",
        "--train.epochs",
        "1",
    ]
    assert runs("run", *scaled) == 0
    assert capsys.readouterr().out.count("train: lr 0.4 = 0.1 x 20 / 5\n") == 1
    assert {line["lr"] for line in runs.metrics("run") if "lr" in line} == {0.4}
    assert runs("same", "--train.optim.lr", "0.4", "--train.schedule.name", "constant", "--train.epochs", "1") == 0
    assert runs.product("run") == runs.product("same")


def test_warnings_of_the_configuration_and_of_the_machine_are_said_once(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    cores = len(os.sched_getaffinity(0))
    settings = ["--data.global_batch_size", "10", "--train.epochs", "1", "--train.schedule.warmup", "0.01"]
    assert runs("run", *dataset(20, 10), *settings, "--data.workers", str(cores + 1)) == 0
    printed = capsys.readouterr().out
    for warning in (
        "stayed 0.02, while data.global_batch_size was 20 and is 10; "
        "scaled linearly (Goyal et al. 2017) it would be 0.01",
        f"warning: data.workers: {cores + 1} worker processes on the {cores} core",
        "warning: train.schedule.warmup: 0.01 of 2 steps is less than one: there is no warm-up",
    ):
        assert printed.count(warning) == 1, printed
    assert printed.count("  -> ") == printed.count("warning: ") == 3


@pytest.mark.slow
def test_a_run_without_mistakes_warns_of_nothing(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    line = "'Epoch [{epoch}/{epochs}], Acc: {top1:.4%}'"
    assert runs("run", "--data.workers", "999", "--log.epoch_format", line) == 0
    printed = capsys.readouterr().out
    assert "warning" not in printed, "workers that image arrays do not start are no mistake"
    top1 = [each["eval_top1"] for each in runs.metrics("run") if "eval_top1" in each]
    expected = [f"Epoch [{epoch}/3], Acc: {value:.4%}" for epoch, value in enumerate(top1, start=1)]
    assert [each for each in printed.splitlines() if each.startswith("Epoch")] == expected
