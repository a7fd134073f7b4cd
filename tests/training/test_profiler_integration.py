"""Profiling writes a trace and a table of the slowest operations, and does not change the run's result."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.support.small_runs import Runs


def test_a_profile_is_written_and_printed_once_and_does_not_change_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    assert runs("plain") == 0
    capsys.readouterr()
    assert runs("traced", "--profile", "{steps: [2, 5]}") == 0
    assert runs.product("plain") == runs.product("traced")
    with gzip.open(tmp_path / "traced" / "logs" / "profile-train.json.gz") as file:
        events = json.load(file)["traceEvents"]
    optimizer_steps = [event for event in events if str(event.get("name")).startswith("Optimizer.step#SGD")]
    assert len(optimizer_steps) == 3
    table = (tmp_path / "traced" / "logs" / "profile-train.txt").read_text()
    rows = [line for line in table.splitlines() if line.rstrip().endswith(tuple("0123456789")) and "%" in line]
    assert len(rows) == 10 and "aten::addmm" in table and "steps 2 to 4" in table
    printed = capsys.readouterr().out
    assert printed.count(table.splitlines()[0]) == 1 and rows[0] in printed


@pytest.mark.parametrize(
    ("steps", "said", "written"),
    [
        ([33, 40], "train: profile.steps [33, 40) lie beyond the stage's 33 steps: nothing is profiled", False),
        ([30, 40], "train: profile.steps [30, 40) reach beyond the stage's 33 steps", True),
    ],
)
def test_steps_that_the_stage_does_not_have_are_said(
    steps: list[int], said: str, written: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Runs(tmp_path)("run", "--profile.steps", str(steps)) == 0
    assert capsys.readouterr().out.count(said) == 1
    table = tmp_path / "run" / "logs" / "profile-train.txt"
    assert table.is_file() == written
    assert not written or "steps 30 to 32" in table.read_text()


def test_a_run_that_fails_while_it_is_profiled_leaves_what_was_recorded(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    assert runs("run", "--profile", "{steps: [1, 9]}", interrupt_at=4) == -1
    assert "steps 1 to 4" in (tmp_path / "run" / "logs" / "profile-train.txt").read_text()
