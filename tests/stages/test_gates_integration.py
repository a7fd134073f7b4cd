"""Each gate fails a run with a planted fault, and names its place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import dist_train
import tests.support.faulty_backends
import tests.support.one_net_all_backends  # noqa: F401
from dist_train import registry
from dist_train.lowering import openvino
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import train
from tests.support.small_runs import Runs

NET = ["--model.name", "stub_net", "--model.args", "{}", "--ptq.samples", "64", "--export.latency", "false"]
TRAINED = [*NET, "--train.epochs", "5", "--train.optim.lr", "0.2"]
PAST_SET_UP = ["--qat.gradient_bound", "1e6"]  # set-up compares gradients, and would refuse a changed eps already
needs_openvino = pytest.mark.skipif(
    bool(registry.export_formats.entry("openvino").missing()), reason="OpenVINO and its writers are not installed"
)


def gates(runs: Runs, name: str = "run") -> dict[str, Any]:
    found: dict[str, Any] = runs.results(name)["gates"]
    return found


# ---- prepare


@pytest.mark.parametrize(
    ("backend", "named"),
    [
        pytest.param("other_eps", {"bn2.eps is 1e-05, but 0.01 in the float model"}, marks=pytest.mark.slow),
        pytest.param("other_momentum", {"bn2.momentum is 0.1, but 0.3 in the float model"}, marks=pytest.mark.slow),
        ("other_dropout", {"dropout.p is 0.5, but 0.2 in the float model"}),
        (
            "fx_other_literals",
            {
                "bn2.eps is 1e-05, but 0.01 in the float model",
                "bn2.momentum is 0.1, but 0.3 in the float model",
                "dropout.p is 0.5, but 0.2 in the float model",
            },
        ),
    ],
)
def test_a_backend_that_changes_a_literal_fails_and_the_literal_is_named(
    backend: str, named: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    assert runs("run", *NET, "--stages", "[ptq]", "--qat.backend", backend, *PAST_SET_UP) == 1
    error = capsys.readouterr().err
    assert "the gate `prepare` failed" in error
    assert {line.strip() for line in error.splitlines() if "in the float model" in line} == named
    prepare = gates(runs)["prepare"]
    assert not prepare["passed"]
    # A changed eps changes the outputs, too; literals that only training uses do not.
    assert (prepare["value"] > prepare["bound"]) == any("eps" in line for line in named)


@pytest.mark.slow
def test_float_literals_are_those_of_every_backend_s_prepared_model(tmp_path: Path) -> None:
    for backend in ("pt2e", "fx", "eager"):
        runs = Runs(tmp_path)
        assert runs(backend, *NET, "--stages", "[ptq]", "--qat.backend", backend) == 0
        assert gates(runs, backend)["prepare"]["passed"]


MOBILE = [
    *("--data.args", "{num_train: 96, num_eval: 40, num_classes: 4, channels: 3, height: 32, width: 32}"),
    *("--model.name", "mobilenet_v3_small", "--model.args", "{}", "--ptq.samples", "64", "--export.latency", "false"),
]


@pytest.mark.long
def test_what_stock_pt2e_does_to_mobilenet_v3_is_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(tmp_path)
    stages = ["--stages", "[train, ptq]", "--train.epochs", "1"]
    assert runs("run", *MOBILE, *stages, "--qat.backend", "stock_pt2e", *PAST_SET_UP) == 1
    error = capsys.readouterr().err
    assert "features.0.1.eps is 1e-05, but 0.001 in the float model" in error
    assert "features.0.1.momentum is 0.1, but 0.01 in the float model" in error
    assert gates(runs)["prepare"]["value"] > 0.01, "the outputs show it, too"


@dist_train.register_model("mobilenet_of_few_steps")
def mobilenet_of_few_steps(num_classes: int) -> nn.Module:
    """Returns MobileNetV3-small with its eps of 1e-3, but a larger momentum, as 0.01 needs thousands of steps."""
    model = torchvision.models.mobilenet_v3_small(num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.2
    return model


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_mobilenet_v3_trains_and_converts_right(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    trained = ["--train.epochs", "12", "--train.evaluate_every", "12", "--train.optim.name", "adam"]
    trained += ["--train.optim.lr", "0.002", "--model.name", "mobilenet_of_few_steps", "--qat.epochs", "2"]
    assert runs("run", *MOBILE, *trained, "--stages", "[train, ptq, qat, convert]") == 0
    results = runs.results("run")
    assert all(gate["passed"] for gate in results["gates"].values())
    assert results["models"]["fp32"]["top1"] > 0.9, "else there is nothing to keep"
    assert results["models"]["int8"]["top1"] >= results["models"]["fp32"]["top1"] - 0.05


# ---- convert and lowered


@pytest.mark.parametrize(("backend", "layer"), [("wrong_scale", "conv2"), ("fx_wrong_scale", "conv1")])
def test_one_wrong_scale_fails_the_run_and_its_layer_is_the_first_of_the_table(
    backend: str, layer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    assert runs("run", *TRAINED, "--stages", "[train, ptq, convert]", "--qat.backend", backend) == 1
    head, _, table = capsys.readouterr().err.partition("the worst first:\n")
    assert "the gate `convert` failed" in head
    lines = table.splitlines()
    assert lines[0].split()[0] == layer and lines[0].endswith("dB")
    recorded = runs.results("run")["layer_sqnr_db"]
    assert next(iter(recorded)) == layer and {"conv1", "conv2", "fc"} <= recorded.keys()
    assert gates(runs)["convert"]["value"] < 0.99 and "lowered" not in gates(runs)


@needs_openvino
def test_int8_is_judged_in_the_runtime_and_a_wrong_one_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, settings, seen = Runs(tmp_path), ["--stages", "[train, ptq, convert]"], []
    right = openvino.open_files

    def wrong(*args: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        call = right(*args)
        seen.append(call)
        return lambda images: call(images).roll(1, 1)

    with monkeypatch.context() as planted:
        planted.setattr(openvino, "open_files", wrong)
        assert runs("run", *settings) == 1
    error = capsys.readouterr().err
    assert "the gate `lowered` failed in openvino" in error and "the cause is openvino, not the layers" in error
    assert "--convert.runtime" in error
    assert gates(runs)["convert"]["passed"] and not gates(runs)["lowered"]["passed"] and len(seen) == 1

    assert runs("run", *settings) == 0, "the same command goes on where the gate ended it"
    lowered, int8 = gates(runs)["lowered"], runs.results("run")["models"]["int8"]
    assert lowered["passed"] and lowered["runtime"] == int8["lowered"]["runtime"] == "openvino"
    assert int8["lowered"]["count"] == int8["count"] == 61
    assert "lowered in openvino" in capsys.readouterr().out


def test_without_a_runtime_the_program_is_judged_in_process_and_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    runs, settings = Runs(tmp_path), ["--stages", "[train, ptq, convert]"]
    assert runs("run", *settings) == 0
    printed = capsys.readouterr().out
    assert "convert: int8 was checked in PyTorch only: onnxscript" in printed
    assert "gate skipped: lowered: onnxscript" in printed
    assert gates(runs)["convert"]["passed"] and "lowered" not in gates(runs)
    assert runs.results("run")["gates_skipped"]["lowered"].startswith("onnxscript")
    assert runs("other", *settings, "--convert.runtime", "onnxruntime") == 78
    assert "convert.runtime (--convert.runtime): 'onnx' needs onnxscript" in capsys.readouterr().err


@pytest.mark.slow
@needs_openvino
def test_two_ranks_judge_their_shares_in_onnx_runtime_and_in_the_fx_program_itself(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    for backend, runtime in (("pt2e", "onnxruntime"), ("fx", "auto")):
        command = [
            "run",
            str(runs.config),
            "--run.dir",
            str(tmp_path / backend),
            "--import",
            "tests.support.one_net_all_backends",
        ]
        settings = ["--stages", "[train, ptq, convert]", "--convert.runtime", runtime, "--qat.backend", backend]
        settings += ["--convert.agreement_bound", "0.95"]  # allows a few of 61 samples to differ
        with train(2, *command, *TRAINED, *settings) as ranks:
            assert ranks.wait() == [0, 0], ranks.printed()
        results = read_json(RunDir(tmp_path / backend).results)
        expected = "torchscript" if backend == "fx" else runtime
        assert results["gates"]["lowered"]["runtime"] == expected and results["gates"]["lowered"]["passed"]
        assert results["models"]["int8"]["lowered"]["count"] == 61


@pytest.mark.slow
def test_when_a_scale_is_wrong_the_table_is_rank_0_s_and_the_others_fail_with_it(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    command = ["run", str(runs.config), "--run.dir", str(tmp_path / "run"), "--stages", "[train, ptq, convert]"]
    imports = [
        "--import",
        "tests.support.one_net_all_backends",
        "--import",
        "tests.support.faulty_backends",
        "--qat.backend",
        "wrong_scale",
    ]
    with train(2, *command, *TRAINED, *imports) as ranks:
        assert ranks.wait() == [1, 1], ranks.printed()
        assert "the worst first:\n  conv2 " in ranks.output(0)
        assert "the gate `convert` failed" in ranks.output(1) and "conv2" not in ranks.output(1)


# ---- artifact


@pytest.mark.slow
def test_a_program_that_is_not_what_was_converted_fails_at_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    settings = ["--stages", "[train, ptq, convert, export]", "--convert.runtime", "none"]
    assert runs("run", *TRAINED, *settings, "--qat.backend", "other_program", "--export.size_bound", "100") == 1
    assert "the gate `artifact` failed" in capsys.readouterr().err
    assert gates(runs)["convert"]["passed"] and gates(runs)["artifact"]["value"] > 1e-5
    assert gates(runs)["size"]["passed"]

    loosened = ["--qat.backend", "other_program", "--export.artifact_bound", "1", "--export.size_bound", "0.2"]
    assert runs("run", *TRAINED, *settings, *loosened) == 1, "a small model's program is mostly its fixed part"
    assert "the gate `size` failed" in capsys.readouterr().err
    assert gates(runs)["size"]["value"] > 1


@pytest.mark.parametrize(
    ("model", "bound"),
    [
        pytest.param("resnet18", 0.27, marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", 0.3, marks=pytest.mark.long),
    ],
)
def test_the_artifact_of_a_model_of_usual_size_is_about_a_quarter(model: str, bound: float, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    data = "{num_train: 16, num_eval: 8, num_classes: 1000, channels: 3, height: 32, width: 32}"
    settings = ["--stages", "[train, ptq, convert, export]", "--train.epochs", "1", "--data.global_batch_size", "8"]
    settings += ["--ptq.samples", "8", "--convert.agreement_bound", "0", "--convert.runtime", "none"]
    settings += ["--export.latency", "false", "--export.size_bound", str(bound)]
    assert runs("run", "--data.args", data, "--model.name", model, "--model.args", "{}", *settings) == 0
    assert 0.25 < gates(runs)["size"]["value"] <= bound
