"""A model that does not fit the images or settings is named at set-up, with a hint what to type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_train
from dist_train.errors import EXIT_CONFIG
from tests.support.small_runs import Runs


class _Dictionary(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"classes": self.fc(x.flatten(1)), "pixels": x}


@dist_train.register_model("dictionary")
def dictionary(num_classes: int, in_channels: int) -> nn.Module:
    return _Dictionary(num_classes)


@dist_train.register_model("plain_layers")
def plain_layers(num_classes: int, in_channels: int, dtype: str = "float32", **settings: Any) -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, num_classes))
    return layers.to(getattr(torch, dtype))


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (["plain_layers", "--model.args", "{dtype: float64}"], "its 0.weight is float64", "return model.float()"),
        (["plain_layers", "--model.args", "{dtype: bfloat16}"], "its 0.weight is bfloat16", "--precision bf16"),
        (["dictionary", "--model.args", "{}"], "returns a dict (classes, pixels), not a tensor", "only the logits"),
    ],
)
def test_it_ends_with_78_before_the_first_step(
    options: list[str], message: str, hint: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs("run", "--model.name", *options) == EXIT_CONFIG
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
    assert hint in printed.partition("->")[2]


def test_synchronising_batch_norms_that_are_not_there_is_a_warning(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--sync_batchnorm", "true", "--train.epochs", "1", "--model.name"]
    assert runs("without", *options, "plain_layers", "--model.args", "{}") == 0
    printed = capsys.readouterr().out
    assert printed.count("warning: sync_batchnorm: does nothing: the model plain_layers has no BatchNorm") == 1
    assert "-> --sync_batchnorm false" in printed
    assert runs("with", *options, "small_resnet", "--model.args", "{width: 4, blocks: 1}") == 0
    assert "does nothing" not in capsys.readouterr().out
