"""The table at the end of a run."""

from __future__ import annotations

import pytest
from rich.console import Console

from dist_train.console.results_table import result_table


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        *((name, "91.53 %") for name in ("top1", "top5", "mean_iou", "pixel_accuracy", "f1", "exact_match", "map")),
        *((name, "0.9153") for name in ("loss", "mae", "rmse", "r2", "error")),
    ],
)
def test_shares_are_shown_as_percent_and_other_numbers_as_they_are(name: str, shown: str) -> None:
    results = {"run": "x", "world_size": 1, "models": {"fp32": {name: 0.9153, "count": 7}}}
    console = Console(width=120)
    with console.capture() as capture:
        console.print(result_table(results))
    assert shown in capture.get()
