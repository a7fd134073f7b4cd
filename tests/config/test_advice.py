"""Warnings for what is right and yet probably not meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_train.cli import main
from dist_train.config.advice import clipping_undone, idle_settings, too_many_workers
from dist_train.config.load import load
from dist_train.config.tree import Config
from dist_train.errors import Problem

BATCH = ["--data.global_batch_size", "1024"]


def warnings(tmp_path: Path, text: str, *options: str) -> tuple[Problem, ...]:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return load(file, list(options), {}).warnings


FILE = "data: {global_batch_size: 256}\nstages: [train]\ntrain: {optim: {lr: 0.1}}\n"


def test_a_batch_changed_without_its_rate_is_said_with_the_scaled_rate(tmp_path: Path) -> None:
    (warning,) = warnings(tmp_path, FILE, *BATCH)
    assert warning.place == "train.optim.lr" and warning.source.endswith("c.yaml:3")
    assert "stayed 0.1, while data.global_batch_size was 256 and is 1024" in warning.message
    assert "it would be 0.4" in warning.message
    assert "--train.optim.lr 0.4, or --train.optim.base_batch_size 256" in warning.hint


@pytest.mark.parametrize(
    "answer", [["--train.optim.lr", "0.4"], ["--train.optim.base_batch_size", "256"], ["--train.optim.lr", "0.1"]]
)
def test_each_answer_that_the_warning_offers_silences_it(tmp_path: Path, answer: list[str]) -> None:
    assert not warnings(tmp_path, FILE, *BATCH, *answer)


@pytest.mark.parametrize(
    ("text", "options", "places"),
    [
        (FILE, [], []),
        (FILE, ["--data.global_batch_size", "256"], []),
        ("stages: [train]", ["--data.global_batch_size", "64"], []),
        ("stages: [train]", ["--data.global_batch_size", "128"], ["train.optim.lr"]),
        ("stages: [train, qat]", BATCH, ["train.optim.lr", "qat.optim.lr"]),
        ("stages: [qat]", BATCH, ["qat.optim.lr"]),
        ("stages: [train, qat]", [*BATCH, "--train.optim.lr", "1"], ["qat.optim.lr"]),
        (FILE + "precision: bf16", ["--data.eval_batch_size", "8"], []),
    ],
)
def test_only_trained_stages_whose_rate_was_not_given_anew_are_warned_of(
    tmp_path: Path, text: str, options: list[str], places: list[str]
) -> None:
    assert [warning.place for warning in warnings(tmp_path, text, *options)] == places


def test_for_adam_the_square_root_is_given_too(tmp_path: Path) -> None:
    (warning,) = warnings(tmp_path, FILE.replace("{lr: 0.1}", "{name: adam, lr: 0.001}"), *BATCH)
    assert "it would be 0.004" in warning.message and "0.002" in warning.message


@pytest.mark.parametrize(
    ("workers", "ranks", "cores", "hint"),
    [
        ("auto", 2, 1, None),
        (0, 2, 1, None),
        (1, 2, 1, None),
        (4, 2, 8, None),
        (5, 2, 8, "--data.workers 4, or auto"),
        (16, 1, 2, "--data.workers 2, or auto"),
        (2, 4, 2, "--data.workers 1, or auto"),
    ],
)
def test_workers_beyond_the_cores(workers: int | str, ranks: int, cores: int, hint: str | None) -> None:
    assert [problem.hint for problem in too_many_workers(workers, ranks, cores)] == ([] if hint is None else [hint])


@pytest.mark.parametrize(
    ("section", "settings", "epochs", "steps", "places"),
    [
        ("train", {"schedule": {"warmup": 0.1}}, 1, 4, ["train.schedule.warmup"]),
        ("train", {"schedule": {"warmup": 0.1}}, 2, 4, []),
        ("train", {"schedule": {"warmup": 0.0}}, 1, 1, []),
        ("train", {"schedule": {"name": "step", "step_epochs": 2}}, 2, 9, ["train.schedule.step_epochs"]),
        ("train", {"schedule": {"name": "step", "step_epochs": 2}}, 3, 9, []),
        ("train", {"early_stopping": {"patience": 2}}, 3, 9, ["train.early_stopping.patience"]),
        ("train", {"early_stopping": {"patience": 2}}, 4, 9, []),
        ("train", {"early_stopping": {"patience": 1}, "evaluate_every": 3}, 6, 9, ["train.early_stopping.patience"]),
        ("qat", {}, 1, 1, ["qat.freeze_batch_norm", "qat.freeze_ranges"]),
        ("qat", {"freeze_batch_norm": 0}, 1, 1, ["qat.freeze_ranges"]),
        ("qat", {}, 2, 5, []),
    ],
)
def test_what_does_nothing_in_so_few_steps_is_said(
    section: str, settings: dict[str, Any], epochs: int, steps: int, places: list[str]
) -> None:
    config = Config.model_validate({section: settings})
    found = list(idle_settings(section, getattr(config, section), epochs, steps))
    assert [problem.place for problem in found] == places and all(problem.hint for problem in found)


def test_config_check_says_the_warnings_and_that_the_configuration_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(FILE)
    assert main(["config", "check", str(tmp_path / "c.yaml"), *BATCH]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("warning: train.optim.lr") and "c.yaml is right: train in " in printed


@pytest.mark.parametrize(
    ("ptq", "qat", "message"),
    [
        ({"ranges": "mse"}, {}, "moves towards"),
        ({"ranges": "percentile"}, {"observer": "min_max"}, "widens to"),
        ({"ranges": "mse"}, {"freeze_ranges": 0}, None),
        ({}, {}, None),
    ],
)
def test_clipped_ranges_that_training_moves_back_are_said(
    ptq: dict[str, Any], qat: dict[str, Any], message: str | None
) -> None:
    found = list(clipping_undone(Config.model_validate({"ptq": ptq, "qat": qat})))
    assert [message in problem.message for problem in found if message is not None] == (
        [] if message is None else [True]
    )
    assert (message is None) == (not found)
