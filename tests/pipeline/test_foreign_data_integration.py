"""Errors in the code of a user's dataset end a run with one error of ours; the traceback is kept in logs/."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.support.raising_data  # registers the dataset
from dist_train.errors import EXIT_FAILED
from dist_train.run_dir.files import read_json
from tests.support.ranks import train
from tests.support.small_runs import Runs

assert tests.support.raising_data
OPTIONS = ("--data.name", "raising", "--data.global_batch_size", "8", "--model.args", "{hidden: 16, size: 4}")


@pytest.mark.parametrize(
    ("place", "said", "kept"),
    [
        ("function", "the dataset raising: ValueError: planted (", "in raising"),
        ("init", "the dataset raising: ValueError: planted (", "in __init__"),
        ("no splits", "the function of the dataset raising returned a Rows, not Splits", ""),
        ("len", "the length of Rows: ValueError: planted (", "in __len__"),
        ("item", "item 13 of Rows: ValueError: planted (", "in __getitem__"),
        ("iter", "the stream of Stream: ValueError: planted (", "in __iter__"),
        ("next", "item 13 of Stream: ValueError: planted (", "in _items"),
    ],
)
def test_an_error_at_any_place_is_one_error_with_its_traceback_in_logs(
    place: str, said: str, kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    assert runs("run", *OPTIONS, "--data.args", f"{{place: {place}}}", "--data.workers", "0") == EXIT_FAILED
    printed = capsys.readouterr().err
    assert printed.count("dist-train: ") == 1 and f"dist-train: {said}" in printed, printed
    assert "  -> " in printed and "Traceback" not in printed
    assert said in read_json(tmp_path / "run" / "status.json")["error"]
    file = tmp_path / "run" / "logs" / "failure-0-rank0.txt"
    assert file.exists() == bool(kept)
    if kept:
        assert kept in file.read_text() and f"traceback: {file}" in printed


def test_on_two_ranks_with_workers_the_item_is_named(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    data = ("--data.workers", "1", "--data.args", "{place: item, kind: 'Unpicklable: planted'}")
    given = (str(runs.config), "--import", "tests.support.raising_data", *OPTIONS, *data)
    with train(2, "run", *given, "--run.dir", str(tmp_path / "run")) as ranks:
        assert ranks.wait() == [EXIT_FAILED, EXIT_FAILED], ranks.printed()
        printed = ranks.output(0) + ranks.output(1)
    assert "item 13 of Rows: Unpicklable: planted" in printed and "Traceback" not in printed
