"""A report on damaged files of a run ends in our error, which names the file and the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_train.errors import RunDirError
from dist_train.report.write import write_report
from dist_train.run_dir.paths import RunDir
from tests.support.written_run_dirs import finished

DAMAGE: list[tuple[str, tuple[str, ...], Any]] = [
    ("status.json", (), []),
    ("status.json", (), 7),
    ("status.json", ("error",), {"a": 1}),
    ("status.json", ("step",), "many"),
    ("results.json", (), [1]),
    ("results.json", ("models",), ["fp32"]),
    ("results.json", ("models", "fp32"), 7),
    ("results.json", ("models", "fp32", "bytes"), "4096"),
    ("results.json", ("models", "fp32", "bytes"), 0),
    ("results.json", ("models", "fp32", "latency_ms"), [0.5]),
    ("results.json", ("models", "int8", "weights"), {}),
    ("results.json", ("world_size",), "2"),
    ("results.json", ("gates", "convert"), None),
    ("results.json", ("gates", "convert", "bound"), None),
    ("results.json", ("gates_skipped",), ["lowered"]),
    ("results.json", ("stages",), 3),
    ("environment.json", (), "x"),
    ("environment.json", ("world_size",), "2"),
    ("report/fp32.json", ("classes",), 3),
    ("report/fp32.json", ("worst",), [7]),
    ("report/fp32.json", ("metrics",), []),
    ("report/fp32.json", ("metrics", "confused_pairs"), [[0, 99, 1.0, 2.0]]),
]


@pytest.mark.parametrize(("file", "place", "value"), DAMAGE)
def test_a_damaged_value_is_named(tmp_path: Path, file: str, place: tuple[str, ...], value: Any) -> None:
    run = finished(tmp_path / "run")
    content = json.loads((run / file).read_text())
    container = content
    for key in place[:-1]:
        container = container[key]
    if place:
        container[place[-1]] = value
    (run / file).write_text(json.dumps(content if place else value))
    with pytest.raises(RunDirError, match=rf"{Path(file).name} is damaged: .*{place[-1] if place else ''}") as caught:
        write_report([run], tmp_path / "out")
    assert caught.value.hint


@pytest.mark.parametrize("text", ["{", "\0", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\x1b[2J"])
@pytest.mark.parametrize("file", ["status.json", "results.json", "environment.json", "report/int8.json"])
def test_a_file_that_is_no_json_is_named(tmp_path: Path, file: str, text: str) -> None:
    run = finished(tmp_path / "run")
    (run / file).write_text(text)
    with pytest.raises(RunDirError, match=f"{Path(file).name} is damaged"):
        write_report([run], tmp_path / "out")


@pytest.mark.parametrize(
    "line",
    ['{"stage": 7, "epoch": 0, "step": 1, "attempt": 0, "loss": 1}', "[" * 5000, '{"loss": 1}', "7", "null"],
)
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, line: str) -> None:
    run = RunDir(finished(tmp_path / "run"))
    run.metrics.write_text(line + "\n")
    with pytest.raises(RunDirError, match=r"metrics\.jsonl, line 1 is damaged"):
        write_report([run.path], tmp_path / "out")


def test_settings_that_are_no_section_are_named(tmp_path: Path) -> None:
    run = RunDir(finished(tmp_path / "run"))
    run.config.write_text("stages: [train]\nrun: 7\n")
    with pytest.raises(RunDirError, match=r"config\.yaml is damaged: run"):
        write_report([run.path], tmp_path / "out")


def test_a_damaged_list_of_our_files_is_named(tmp_path: Path) -> None:
    run = finished(tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()
    for text in ('{"a": 1}', "[7]", "7"):
        (out / ".written.json").write_text(text)
        with pytest.raises(RunDirError, match="it is no list of names"):
            write_report([run], out)
