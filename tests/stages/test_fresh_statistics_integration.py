"""Trains a deep network that begins with qat: its batch norms have no statistics yet to learn ranges with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dist_train
from dist_train.stages import ptq
from tests.support.small_runs import Runs

DEPTH = 8


@dist_train.register_model("fading")
def fading(num_classes: int, in_channels: int) -> nn.Module:
    """Returns a net whose untrained blocks shrink activations by more than half in eval mode, but not in train mode."""
    parts: list[nn.Module] = []
    for index in range(DEPTH):
        conv = nn.Conv2d(8 if index else in_channels, 8, 3, padding=1, bias=False)
        with torch.no_grad():
            conv.weight.mul_(0.05)
        parts += [conv, nn.BatchNorm2d(8), nn.SiLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def first_gradient(runs: Runs, name: str, backend: str) -> float:
    """Returns the norm of all gradients at a run's first step."""
    options = [
        "--model.name",
        "fading",
        "--model.args",
        "{}",
        "--qat.backend",
        backend,
        "--qat.optim.lr",
        "0.000001",
        "--qat.epochs",
        "1",
    ]
    assert runs(name, *options, "--stages", "[qat]") == 0
    return float(next(line["grad_norm"] for line in runs.metrics(name) if "loss" in line))


@pytest.mark.parametrize("backend", ["fx", pytest.param("pt2e", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_its_statistics_are_estimated_before_its_ranges(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    estimated = first_gradient(runs, "run", backend)
    assert capsys.readouterr().out.count("batch norms have no statistics yet") == 1
    monkeypatch.setattr(ptq, "_has_initial_statistics", lambda model: False)
    faded = first_gradient(runs, "without", backend)
    assert faded < 0.1 * estimated, "ranges of faded activations clip them, and their gradients"
