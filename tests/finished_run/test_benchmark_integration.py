"""`dist-train benchmark` of a real run: figures that agree with the run's, files of its own, reasons for the rest."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train import registry
from dist_train.cli import main
from dist_train.lowering.latency import OneByOne
from dist_train.lowering.runtimes import RUNTIMES, Opened, Runtime
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.support.compilers import hide_compiler
from tests.support.small_runs import Runs, run_here
from tests.support.torch_settings import own_torch_settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(registry.export_formats.entry(name).missing() for name in ("onnx", "openvino")), reason="not installed"
    ),
]
FAST = ("--seconds", "0.01", "--batch-sizes", "1", "3")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the directory of a run with an fp32 and an int8 model, of which int8 was exported as ONNX."""
    runs = Runs(tmp_path_factory.mktemp("benchmark"))
    stages = ("--stages", "[train, ptq, convert, export]", "--export.formats", "[onnx]")
    assert runs("done", *stages, "--convert.runtime", "none", "--export.latency", "false") == 0
    return runs.folder / "done"


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    hide_compiler(monkeypatch)
    with own_torch_settings():
        yield


def files(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "benchmark")
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.slow
def test_models_formats_and_runtimes_are_side_by_side(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(run)
    assert main(["benchmark", str(run), *FAST, "--samples", "61", "--formats", "pt2", "onnx", "openvino"]) == 0
    assert files(run) == before
    printed = capsys.readouterr().out
    assert "samples/s, batch 3" in printed and "not in export/" in printed
    results = read_json(run / "benchmark" / "benchmark.json")
    rows = results["rows"]
    assert [(row["model"], row["format"], row["runtime"].split()[0], row["exported"]) for row in rows] == [
        (model, format, runtime, model == "int8" and format in ("pt2", "onnx"))
        for model in ("fp32", "int8")
        for format, runtime in (
            ("pt2", "torch"),
            ("pt2", "inductor"),
            ("onnx", "onnxruntime"),
            ("onnx", "openvino"),
            ("openvino", "openvino"),
        )
    ]
    models = read_json(RunDir(run).results)["models"]
    for row in rows:
        if row["runtime"] == "inductor":
            assert "no C++ compiler" in row["left_out"] and not row["latency_ms"]
            continue
        assert row["left_out"] == ""
        assert row["score"] == pytest.approx(models[row["model"]]["top1"], abs=0.02)
        assert row["agreement"] > 0.97 and row["difference"] < 0.2
        for name in ("latency_ms", "throughput"):
            assert set(row[name]) == {"1", "3"}
            assert all(0 < each["low"] <= each["median"] <= each["high"] for each in row[name].values())
        assert (row["at_once"]["1"] >= 1) if "openvino" in row["runtime"] else (row["at_once"] == {"1": 1, "3": 1})
    assert rows[0]["agreement"] == 1.0 and rows[0]["bytes"] == models["fp32"]["bytes"]
    onnx = next(row for row in rows if (row["model"], row["format"]) == ("int8", "onnx"))
    assert onnx["bytes"] == (run / "export" / "model.onnx").stat().st_size
    with (run / "benchmark" / "benchmark.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["top1"] for line in lines] == ["" if row["score"] is None else str(row["score"]) for row in rows]
    assert float(lines[0]["latency_ms_3"]) == rows[0]["latency_ms"]["3"]["median"]
    assert (run / "benchmark" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_a_benchmark_is_not_overwritten_without_being_asked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "benchmark" / "benchmark.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    only = [*FAST, "--samples", "10", "--formats", "pt2"]
    assert main(["benchmark", str(run), *only]) == 78
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert file.read_text() == "{}"
    assert main(["benchmark", str(run), *only, "--output", str(file)]) == 78
    assert "--output DIR" in capsys.readouterr().err
    assert main(["benchmark", str(run), *only, "--overwrite"]) == 0
    assert read_json(file)["samples"] == 10


def planted(answer: Any) -> Runtime:
    def opened(files: Any, example: torch.Tensor, threads: int, outputs: Any) -> Opened:
        call = lambda images: answer(torch.zeros(len(images), 6))  # noqa: E731
        return Opened("planted 1", call, OneByOne(call))

    return Runtime("planted", "torch", opened)


@pytest.mark.slow
def test_wrong_and_missing_runtimes_are_left_out_with_the_reason(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, infinite = planted(lambda zeros: zeros + 1), planted(lambda zeros: zeros / 0)
    missing = Runtime("absent", "no_such_module_at_all", wrong.open)
    monkeypatch.setitem(RUNTIMES, "onnx", (wrong, infinite, missing))
    entry = registry.Entry("dist_train.lowering.openvino:write", requires={"no_such_module_at_all": "no-such-package"})
    monkeypatch.setitem(registry.export_formats._entries, "openvino", entry)
    arguments = [*FAST, "--samples", "20", "--formats", "onnx", "openvino", "--output", str(tmp_path / "out")]
    assert main(["benchmark", str(run), *arguments]) == 0
    rows = [row for row in read_json(tmp_path / "out" / "benchmark.json")["rows"] if row["model"] == "int8"]
    reasons = [row["left_out"] for row in rows]
    assert reasons[0].startswith("not timed: answers differently (") and rows[0]["score"] is not None
    assert reasons[1] == "not timed: some of its answers are not finite"
    assert reasons[2] == "no_such_module_at_all not installed: pip install no_such_module_at_all"
    assert all(not row["latency_ms"] for row in rows)
    assert (
        "note: openvino is measured only where export/ has it: pip install no-such-package" in capsys.readouterr().out
    )


@pytest.mark.slow
def test_a_runtime_that_is_wrong_under_load_alone_is_not_timed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = RUNTIMES["onnx"][0]

    def opened(files: Any, example: torch.Tensor, threads: int, outputs: Any) -> Opened:
        good = right.open(files, example, threads, outputs)
        return Opened("mixed up", good.call, OneByOne(lambda images: good.call(images).flip(1)))

    monkeypatch.setitem(RUNTIMES, "onnx", (Runtime("mixed up", "torch", opened),))
    assert main(["benchmark", str(run), *FAST, "--formats", "onnx", "--output", str(tmp_path / "out")]) == 0
    rows = read_json(tmp_path / "out" / "benchmark.json")["rows"]
    assert all("answers differently under load, at batch 1" in row["left_out"] for row in rows)


@pytest.mark.slow
def test_of_an_unfinished_run_the_models_that_are_there_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    assert runs("cut", "--stages", "[train, ptq, convert, export]", "--train.epochs", "1", interrupt_at=2) == -1
    assert run_here("benchmark", str(tmp_path / "cut")) == 78
    assert "has no trained model yet" in capsys.readouterr().err
    stages = ["--stages", "[train, ptq, qat, convert]", "--train.epochs", "1"]
    assert runs("half-way", *stages, interrupt_at=15) == -1
    capsys.readouterr()
    code = run_here("benchmark", str(tmp_path / "half-way"), *FAST, "--formats", "pt2")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "note: the run has not finished qat, convert: only fp32 is there" in printed.out


def test_it_is_for_one_process(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["benchmark", str(run)]) == 78
    assert f"type dist-train benchmark {run}, without torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_formats_of_other_packages_are_written_and_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.export_formats._entries, "other", registry.export_formats.entry("onnx"))
    assert main(["benchmark", str(run), *FAST, "--formats", "other", "--output", str(tmp_path / "out")]) == 0
    rows = read_json(tmp_path / "out" / "benchmark.json")["rows"]
    assert [row["format"] for row in rows] == ["other"] * 2 and all(row["latency_ms"] for row in rows)
