"""Int8 formats must agree in their decisions and open in a fresh process, or nothing is written."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_train import registry
from dist_train.artifact.store import verify_artifact
from dist_train.cli import main
from dist_train.errors import DataError
from dist_train.lowering import onnx, openvino
from dist_train.lowering.agreement import Decisions
from dist_train.tasks import Classification
from dist_train.tasks.regression import Regression
from tests.support.small_runs import Runs

needs = pytest.mark.skipif(
    bool([*registry.export_formats.entry("onnx").missing(), *registry.export_formats.entry("openvino").missing()]),
    reason="ONNX Runtime or OpenVINO is not installed",
)
SETTINGS = [
    *("--stages", "[train, ptq, convert, export]", "--train.epochs", "1", "--convert.runtime", "none"),
    *("--ptq.samples", "64", "--export.latency", "false", "--convert.agreement_bound", "0.95"),
]


def tipping(*args: Any) -> tuple[Callable[[Tensor], Tensor], str]:
    """Returns an ONNX Runtime that swaps the two likeliest classes, if close, in rows after the first sixteen."""
    right, name = OPEN(*args)

    def call(images: Tensor) -> Tensor:
        answers = right(images).clone()
        (first, second), (high, low) = answers.topk(2).values.T, answers.topk(2).indices.T
        for row in range(16, len(answers)):
            answers[row, high[row]], answers[row, low[row]] = second[row], first[row]
        return answers

    return call, name


OPEN = onnx.open_onnx


@needs
def test_a_format_that_decides_otherwise_fails_the_run_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    monkeypatch.setattr(onnx, "open_onnx", tipping)
    assert runs("run", *SETTINGS, "--export.formats", "[onnx]") == 1
    error = capsys.readouterr().err
    assert "the gate `format_onnx` failed in onnxruntime" in error and "bound 0.95" in error
    gate = runs.results("run")["gates"]["format_onnx"]
    percent = math.floor(gate["value"] * 1000) / 10  # runtimes of CPUs without VNNI round otherwise
    assert f"int8 as onnx is not written: it decides the same on {percent:g} % of 61 samples" in error
    assert "leave onnx out" in error and "--convert.agreement_bound" in error
    assert not (tmp_path / "run" / "export").exists()
    assert not gate["passed"] and 0 < gate["value"] < 0.5 and gate["samples"] == 61


@needs
@pytest.mark.slow
def test_a_format_that_decides_alike_is_recorded_and_a_later_one_is_judged_by_the_data_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, formats = Runs(tmp_path), ["--export.formats", "[openvino, onnx]"]
    assert runs("run", *SETTINGS, *formats) == 0
    results, manifest = runs.results("run"), verify_artifact(tmp_path / "run")
    for name in ("openvino", "onnx"):
        gate, listed = results["gates"][f"format_{name}"], manifest["models"]["int8"]["formats"][name]
        assert gate["passed"] and gate["samples"] == listed["samples"] == 61 and gate["value"] == listed["agreement"]
    assert results["gates"]["artifact_formats"]["value"] <= 1e-4
    assert "format_onnx in onnxruntime" in capsys.readouterr().out

    before = {path: path.read_bytes() for path in (tmp_path / "run" / "export").iterdir()}
    with monkeypatch.context() as planted:
        planted.setattr(onnx, "open_onnx", tipping)
        assert main(["export", str(tmp_path / "run"), "--format", "onnx"]) == 1
    assert "the gate `format_onnx` failed in onnxruntime" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "run" / "export").iterdir()} == before

    assert main(["export", str(tmp_path / "run"), "--format", "onnx"]) == 0
    assert "same decision on" in capsys.readouterr().out
    with monkeypatch.context() as planted:
        planted.setitem(registry.datasets._entries, "fake", registry.Entry(not_here))
        assert main(["export", str(tmp_path / "run"), "--format", "onnx"]) == 1
    assert (
        "formats of int8 are checked on the run's evaluation set, which cannot be read here" in capsys.readouterr().err
    )


def not_here(data: Any) -> Any:
    raise DataError("there is no folder /data", "--data.root FOLDER")


@needs
@pytest.mark.parametrize("fault", ["other weights", pytest.param("no weights", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_file_that_is_not_what_was_judged_is_found_in_a_fresh_process(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, write = ("openvino", openvino.write) if fault == "no weights" else ("onnx", onnx.write)

    def faulty(model: nn.Module, *args: Any) -> Any:
        written = write(model, *args)
        if fault == "no weights":
            return dataclasses.replace(written, files={"xml": written.files["xml"]})
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.data.neg_()
        return dataclasses.replace(written, files=write(other, *args).files)

    monkeypatch.setitem(registry.export_formats._entries, name, registry.Entry(faulty))
    settings = ["--stages", "[train, export]", "--train.epochs", "1", "--export.latency", "false"]
    assert Runs(tmp_path)("run", *settings, "--export.formats", f"[{name}]") == 1
    error = capsys.readouterr().err
    if fault == "no weights":
        assert "fp32 as openvino, model.xml, cannot be opened and run" in error
    else:
        assert "the gate `artifact_formats` failed" in error and "fp32 as onnx: differs by" in error
    assert not (tmp_path / "run" / "export").exists()


def test_an_agreement_is_of_all_samples_and_not_finite_answers_never_agree() -> None:
    task, batches = Classification(3, {}), [torch.eye(3), torch.eye(3)[:1]]
    decisions = Decisions(lambda images: images, task, batches, 0.9)
    assert decisions.agreement(lambda images: images * 2) == dataclasses.replace(
        decisions.agreement(lambda images: images), share=1.0
    )
    found = decisions.agreement(lambda images: images.roll(1, 1) if len(images) == 1 else images)
    assert (found.share, found.samples, found.passed) == (0.75, 4, False)
    broken = decisions.agreement(lambda images: images / 0)
    assert not broken.passed and "some of its answers to 4 samples are not finite" in broken.in_words()


def test_decisions_that_are_numbers_agree_within_the_spread_of_all_samples() -> None:
    task, batches = Regression(1, {}), [torch.tensor([[0.0], [1.0]]), torch.tensor([[100.0]])]
    decisions = Decisions(lambda images: images, task, batches, 0.9)
    assert decisions.agreement(lambda images: images + 0.01).share == 1.0
    assert decisions.agreement(lambda images: -images).share < 1.0
