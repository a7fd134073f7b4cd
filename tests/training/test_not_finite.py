"""Parameters that are not finite are found wherever they hide."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.training.same_state import not_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_one_element_anywhere_is_found(value: float, dtype: torch.dtype) -> None:
    for size in (1, 3, 16, 33, 1000, 70_001):
        for place in sorted({0, size // 2, size - 1}):
            data = torch.linspace(-1, 1, size).to(dtype)
            model = nn.ParameterDict({"first": nn.Parameter(torch.ones(3)), "second": nn.Parameter(data)})
            assert not_finite(model) is None
            with torch.no_grad():
                model["second"][place] = value
            assert not_finite(model) == "second"


def test_large_values_empty_and_integer_parameters_are_finite() -> None:
    large = nn.Parameter(torch.full((5,), torch.finfo(torch.float32).max))
    empty, whole = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    assert not_finite(nn.ParameterDict({"large": large, "empty": empty, "whole": whole})) is None
    assert not_finite(nn.ReLU()) is None
