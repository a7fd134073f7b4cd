"""A run reports its int8 model's share of int8 weights, its size, and the gates that did not run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dist_train
from dist_train.artifact.store import verify_artifact
from dist_train.cli import main
from tests.support.small_runs import Runs


@dist_train.register_model("recurrent")
def recurrent(num_classes: int) -> nn.Module:
    """Returns an LSTM over an image's rows, which no backend quantizes, with a head, which all quantize."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, num_classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x.flatten(1, 2))[0][:, -1])

    return Net()


def project(x: Tensor, matrix: Tensor) -> Tensor:
    return nn.functional.linear(x, matrix)


torch.fx.wrap("project")  # as torchvision wraps Swin's attention: fx does not trace into it


@dist_train.register_model("projected")
def projected(num_classes: int) -> nn.Module:
    """Returns a net with a projection by a function, a hidden layer and a head."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(32, 64) / 8)
            self.hidden, self.head = nn.Linear(32, 32), nn.Linear(32, num_classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.hidden(torch.relu(project(x.flatten(1), self.matrix)))))

    return Net()


@pytest.mark.slow
def test_mostly_float_is_warned_of_recorded_and_in_the_manifest_and_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, settings = Runs(tmp_path), ["--stages", "[train, ptq, convert, export]", "--export.latency", "false"]
    recurrent = ["--model.name", "recurrent", "--model.args", "{}", "--train.epochs", "1", "--convert.runtime", "none"]
    assert runs("run", *settings, *recurrent, "--convert.agreement_bound", "0") == 0
    printed = capsys.readouterr().out
    line = "convert: 3.6 % of the weights are int8; float: lstm (5,120); no other backend quantizes more"
    assert f"warning: {line}" in printed
    weights = runs.results("run")["models"]["int8"]["weights"]
    assert (weights["int8"], weights["float"], weights["float_modules"]) == (192, 5120, {"lstm": 5120})
    listed = verify_artifact(tmp_path / "run")["models"]["int8"]["weights"]
    assert listed == {key: value for key, value in weights.items() if key != "said"}

    int8, fp32 = (runs.results("run")["models"][name]["bytes"] for name in ("int8", "fp32"))
    assert int8 > fp32
    assert f"warning: export: int8 is not smaller than FP32: {int8:,} bytes against {fp32:,}" in printed

    assert runs.results("run")["gates_skipped"] == {"lowered": "convert.runtime is none"}
    assert "lowered" not in runs.results("run")["gates"], "what is there was measured"
    assert "gate skipped: lowered: convert.runtime is none" in printed

    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert "3.6 % of the weights" in page and "floating point: lstm" in page
    assert "lowered skipped" in page and "convert.runtime is none" in page


def test_the_backend_that_takes_more_is_named_and_so_is_what_rules_leave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, model = Runs(tmp_path), ["--model.name", "projected", "--model.args", "{}", "--train.epochs", "1"]
    rules = ["--qat.rules", "[{match: head, skip: true}]", "--qat.backend", "fx", "--convert.agreement_bound", "0"]
    assert runs("run", "--stages", "[train, ptq, convert]", *model, *rules) == 0
    assert (
        "warning: convert: 31.3 % of the weights are int8; float: matrix (2,048), head (192); "
        "qat.rules leave 192 of them in floating point; --qat.backend pt2e quantizes 94.1 %"
    ) in capsys.readouterr().out
