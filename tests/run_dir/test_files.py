"""Small files are replaced whole, also by several writers at once."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dist_train.run_dir.files import last_line, read_json, replace_bytes, replace_json
from dist_train.run_dir.paths import RunDir
from dist_train.trackers.jsonl import JsonLines


def test_writers_at_once_leave_one_of_their_texts_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "status.json"

    def write(number: int) -> None:
        for _ in range(50):
            replace_json(path, {"number": number, "long": "x" * 5000})
            assert set(read_json(path)) == {"number", "long"}

    with ThreadPoolExecutor(4) as pool:
        for each in [pool.submit(write, number) for number in range(4)]:
            each.result()
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_there_is_no_json_in_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert read_json(tmp_path / "none.json") is None


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    replace_bytes(path, b"old")
    with pytest.raises(TypeError):
        replace_bytes(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    replace_json(tmp_path / "results.json", {"loss": 1.0})
    with pytest.raises(ValueError):
        replace_json(tmp_path / "results.json", {"loss": math.nan})
    assert read_json(tmp_path / "results.json") == {"loss": 1.0}


def test_metrics_stay_strict_json_and_are_added_to_across_attempts(tmp_path: Path) -> None:
    for attempt in range(2):
        tracker = JsonLines(RunDir(tmp_path), "run", attempt)
        tracker.log("train", 0, attempt, {"loss": 0.5, "f1": math.nan, "worst": math.inf})
        tracker.sync()
        tracker.close()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in RunDir(tmp_path).metrics.read_text().splitlines()]
    assert [
        (line["attempt"], line["stage"], line["epoch"], line["step"], line["loss"], line["f1"]) for line in lines
    ] == [(number, "train", 0, number, 0.5, None) for number in (0, 1)]
    assert all(line["time"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ('{"a": 1}', None),
        ('{"a": 1}\n', {"a": 1}),
        ('{"a": 1}\n{"a": 2}\n{"a', {"a": 2}),
        (f'{{"a": "{"x" * 20_000}"}}\n{{"b": "{"y" * 20_000}"}}\n{{"torn', {"b": "y" * 20_000}),
        ("{}\nno json\n", None),
    ],
)
def test_the_last_line_is_the_last_whole_one(text: str, expected: object, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text(text)
    assert last_line(tmp_path / "lines.jsonl") == expected
    assert last_line(tmp_path / "none.jsonl") is None
