"""Curves are those of the whole run, however many attempts it took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_train.errors import RunDirError
from dist_train.report.charts import charts
from dist_train.report.read import RunRecord, join_attempts, read_points, read_runs
from dist_train.run_dir.paths import RunDir
from tests.support.written_run_dirs import curves, finished, line, log, started


def joined(tmp_path: Path, lines: list[dict[str, Any]]) -> list[tuple[str, int, int, float | None]]:
    run = RunDir(tmp_path)
    log(run, lines)
    return [(point.stage, point.step, point.attempt, point.value) for point in join_attempts(read_points(run.metrics))]


def test_of_a_repeated_step_the_highest_attempt_counts(tmp_path: Path) -> None:
    lines = [line("train", step, loss=1.0 + step) for step in (0, 10, 20)]
    lines += [line("train", step, 1, loss=100.0 + step) for step in (10, 20, 30)]
    assert joined(tmp_path, lines) == [
        ("train", 0, 0, 1.0), ("train", 10, 1, 110.0), ("train", 20, 1, 120.0), ("train", 30, 1, 130.0)
    ]  # fmt: skip


def test_steps_that_a_later_attempt_did_again_but_did_not_log_are_dropped(tmp_path: Path) -> None:
    lines = [line("train", step, loss=1.0) for step in (0, 5, 10, 15, 40)] + [line("qat", 5, loss=7.0)]
    lines += [line("train", step, 1, loss=2.0) for step in (10, 20)]
    assert [point[:3] for point in joined(tmp_path, lines)] == [
        ("train", 0, 0), ("train", 5, 0), ("train", 10, 1), ("train", 20, 1), ("train", 40, 0), ("qat", 5, 0)
    ]  # fmt: skip


def test_a_line_that_is_being_written_is_left_out_and_a_value_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    (run,) = read_runs([started(tmp_path / "run")])
    assert [point.value for point in run.curve("train", "loss")] == [1.0, None, 1.0]


@pytest.mark.parametrize("damage", ["{broken\n", "[1]\n", '{"stage": "train", "loss": 1.0}\n'])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    run = RunDir(started(tmp_path / "run"))
    run.metrics.write_text('{"time":1,"stage":"train","epoch":0,"step":0,"attempt":0,"loss":1}\n' + damage)
    with pytest.raises(RunDirError, match=r"metrics.jsonl, line 2 is damaged"):
        read_runs([run.path])


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [finished(tmp_path / place, name) for place, name in (("a", "same"), ("b", "same"), ("c", "other"))]
    assert [run.label for run in read_runs(paths)] == [str(paths[0]), str(paths[1]), "other"]


def test_models_are_in_the_order_of_the_stages_and_other_files_are_no_models(tmp_path: Path) -> None:
    path = finished(tmp_path / "run")
    (path / "report" / "notes.json").write_text('{"mine": 1}')
    (run,) = read_runs([path])
    assert list(run.details) == ["fp32", "int8"]


def titles(run: RunRecord) -> list[tuple[str, str, list[str]]]:
    return [(chart.stage, chart.title, [curve.kind for curve in chart.curves]) for chart in charts([run])]


def test_every_scalar_of_any_task_has_a_chart(tmp_path: Path) -> None:
    lines = [*curves(), line("train", 7, eval_mae=3.0, grad_norm=1.0)]
    (run,) = read_runs([finished(tmp_path / "run", lines=lines)])
    assert titles(run) == [
        ("train", "loss", ["training", "evaluation"]),
        ("train", "accuracy", ["training", "top1"]),
        ("train", "learning rate", ["training"]),
        ("train", "samples per second", ["training"]),
        ("train", "mae", ["evaluation"]),
        ("train", "grad_norm", ["training"]),
        ("qat", "loss", ["training"]),
        ("qat", "learning rate", ["training"]),
        ("qat", "samples per second", ["training"]),
        ("qat", "score", ["training"]),
    ]


def test_long_curves_are_thinned_to_means(tmp_path: Path) -> None:
    (run,) = read_runs([finished(tmp_path / "run", lines=[line("train", step, loss=step) for step in range(1800)])])
    (curve,) = charts([run])[0].curves
    assert len(curve.steps) == 600
    assert (curve.steps[:2], curve.values[:2]) == ([1.0, 4.0], [1.0, 4.0])
