"""A gate records the measured value, and NaN never passes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from dist_train.errors import GateError
from dist_train.lowering.comparison import largest
from dist_train.run_dir.files import read_json
from dist_train.run_dir.gates import Gate, Gates
from dist_train.run_dir.paths import RunDir
from dist_train.stages.prepare_gate import (
    _called_batch_norms,
    _draw_variances,
    _missing_batch_norms,
    _relative_difference,
)


def judge(tmp_path: Path, value: float, bound: float) -> dict[str, Any]:
    """Checks a gate and returns its record."""
    results: dict[str, Any] = {"gates": {}}
    gate = Gate(name="prepare", value=value, bound=bound, passed=value <= bound, hint="type this")
    Gates(RunDir(tmp_path), results, is_main=True).check(gate)
    record: dict[str, Any] = results["gates"]["prepare"]
    return record


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

    measured = [_relative_difference(model, nn.Identity(), torch.ones(2, 3)) for model in (nn.Identity(), Nan())]
    assert measured[0] == 0
    assert not largest(measured) <= 1e-4


def deep_net() -> nn.Sequential:
    """Returns a net with large weights whose batch norms scale the activations back, as trained statistics do."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(16):
        convolution, norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3)
        with torch.no_grad():
            convolution.weight.mul_(2e3)
            assert norm.running_var is not None
            norm.running_var.fill_(1.3e6)
        layers += [convolution, norm, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def test_drawn_variances_leave_a_deep_trained_net_what_it_computes_and_show_another_eps() -> None:
    float_model, images = deep_net(), torch.rand(2, 8, 8, 8)
    prepared = deep_net()
    norms = [
        (module, other) for module, other in zip(prepared, float_model, strict=True) if "Norm" in str(type(module))
    ]
    with torch.no_grad():
        before = float_model(images)
        assert before.abs().max() > 1e-3
        _draw_variances(norms, seed=0)
        torch.testing.assert_close(float_model(images), before, rtol=1e-3, atol=1e-5)
        assert _relative_difference(prepared, float_model, images) == 0
        norms[-1][0].eps = 1e-5  # type: ignore[assignment]
        assert _relative_difference(prepared, float_model, images) > 1e-3


class _Prepared(nn.Module):
    batch_norms: ClassVar[dict[str, str]] = {"a": "elsewhere", "shared": "elsewhere"}


def test_a_called_batch_norm_that_the_prepared_model_lacks_is_named() -> None:
    norms = {name: nn.BatchNorm2d(3) for name in ("a", "b", "uncalled", "shared")}
    model = nn.ModuleDict(norms)
    model["alias"] = norms["shared"]
    with _called_batch_norms(model) as called:
        for name in ("a", "b", "alias"):
            model[name](torch.rand(2, 3, 4, 4))
    lines = _missing_batch_norms(model, _Prepared(), called)  # type: ignore[arg-type]
    assert lines == ["b: this BatchNorm2d is no batch norm in the prepared model, and would never learn"]
    model["uncalled"](torch.rand(2, 3, 4, 4))
    assert len(called) == 3, "the hooks are gone"
