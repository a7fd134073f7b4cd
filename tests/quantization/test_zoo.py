"""Forty models of timm and torchvision, as the docs' table has them, and by a trial of each."""

from __future__ import annotations

import re

import pytest

from benchmarks.zoo import MODELS, SIZES, outcome
from tests.quantization.conformance import PAGE

BACKENDS = ("pt2e", "fx")
IN_CI = ("timm/lcnet_050", "timm/convnext_atto")  # BatchNorm with its activation in a class of its own; a GELU
_SHARE = re.compile(r"int8, ([\d.]+) ?%")


def _rows() -> dict[str, dict[str, str]]:
    _, _, section = PAGE.read_text().partition("## Forty models")
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \| (.+) \|$", section.partition("\n## ")[0], re.MULTILINE)
    return {name: dict(zip(BACKENDS, cells, strict=True)) for name, *cells in rows}


def _in_integers(cell: str) -> float | None:
    """Returns the percentage of the weights that become integers; None for a refusal."""
    found = _SHARE.match(cell)
    return float(found[1]) if found else None


def test_the_page_has_each_model_and_38_of_40_become_int8() -> None:
    rows = _rows()
    assert sorted(rows) == sorted(MODELS)
    assert len(rows) == 40
    int8 = [name for name, cells in rows.items() if any(_in_integers(cell) is not None for cell in cells.values())]
    assert len(int8) >= 38
    assert all(
        _in_integers(cell) is not None or cell.startswith("refused: ") for row in rows.values() for cell in row.values()
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "model", [pytest.param(each, marks=pytest.mark.slow if each in IN_CI else pytest.mark.long) for each in MODELS]
)
def test_the_page_is_what_happens(model: str, backend: str) -> None:
    expected = _in_integers(_rows()[model][backend])
    cell = outcome(model, backend, SIZES.get(model, 64), timeout=900)
    assert "failed (" not in cell and "no end within" not in cell, cell
    share = _in_integers(cell)
    if expected is None or share is None:
        assert expected is share and re.match("refused: .+ -> .+", cell), cell
    else:
        assert share == pytest.approx(expected, abs=0.06), cell
