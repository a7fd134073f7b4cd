"""A gate records what was measured, and lets nothing pass that is not a number."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from dist_train.errors import GateError
from dist_train.run_dir import RunDir, read_json
from dist_train.stages.context import Context
from dist_train.stages.ptq import _relative_difference
from dist_train.world import World


def judge(tmp_path: Path, value: float, bound: float) -> dict[str, Any]:
    """The recorded gate, from a context that has what `Context.gate` needs."""
    context = SimpleNamespace(world=World(), run_dir=RunDir(tmp_path), results={"gates": {}})
    Context.gate(cast(Context, context), "prepare", value, bound, value <= bound, "type this")
    gate: dict[str, Any] = context.results["gates"]["prepare"]
    return gate


def test_what_lies_within_the_bound_passes(tmp_path: Path) -> None:
    assert judge(tmp_path, 1e-5, 1e-4) == {"value": 1e-5, "bound": 1e-4, "passed": True}


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_what_does_not_pass_is_on_the_disk_before_the_run_ends(value: float, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="gate `prepare` failed"):
        judge(tmp_path, value, 1e-4)
    gate = read_json(RunDir(tmp_path).results)["gates"]["prepare"]
    assert not gate["passed"]
    assert gate["value"] == (value if math.isfinite(value) else None)


def test_a_model_that_answers_nan_does_not_look_like_an_equal_one() -> None:
    class Nan(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * math.nan

    measured = torch.stack(
        [_relative_difference(model, nn.Identity(), torch.ones(2, 3)) for model in (nn.Identity(), Nan())]
    )
    assert measured[0] == 0
    assert not float(measured.max()) <= 1e-4
