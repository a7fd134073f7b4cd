"""The table at the end of a run."""

from __future__ import annotations

import pytest
from rich.console import Console

from dist_train.console.results_table import print_results, result_table


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


def test_names_are_printed_as_they_are_whatever_they_hold(capsys: pytest.CaptureFixture[str]) -> None:
    models = {"[/red][link=http://a]x": {"top1": 0.5, "count": 7}, "\x1b[2Jcat": {"top1": 0.5, "count": 7}}
    skipped = {"gate\x1b[31m": "a [bold]reason\x07"}
    print_results({"run": "x", "world_size": 1, "models": models, "gates": {}, "gates_skipped": skipped})
    shown = capsys.readouterr().out
    assert "[/red][link=http://a]x" in shown and r"\x1b[2Jcat" in shown
    assert r"gate skipped: gate\x1b[31m: a [bold]reason\x07" in shown
    assert "\x1b" not in shown and "\x07" not in shown
