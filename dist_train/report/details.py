"""Prepares the page's section about single classes and samples."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from dist_train.report import tables
from dist_train.report.draw import confusion_image
from dist_train.report.read import RunRecord
from dist_train.report.tables import Table

_MOST_CLASSES = 24  # of a confusion matrix that can be read as a table
_MOST_ROWS = 40
_MOST_PAIRS = 10  # beside a picture of the matrix


def run_details(run: RunRecord) -> dict[str, Any]:
    """Accuracy per class of all models; of each model the confusion matrix or worst pairs, and the worst samples."""
    per_class, left_out = tables.per_class(run), ""
    if per_class is not None and len(per_class.rows) > _MOST_ROWS:
        left_out = f"The {_MOST_ROWS} worst of {len(per_class.rows)} classes, by {per_class.headers[-1]}."
        rows = sorted(per_class.rows, key=lambda row: (row[-1] is None, row[-1]))[:_MOST_ROWS]
        per_class = Table(per_class.headers, rows)
    return {
        "label": run.label,
        "per_class": per_class,
        "left_out": left_out,
        "models": [_model(name, details) for name, details in run.details.items()],
    }


def _model(name: str, details: dict[str, Any]) -> dict[str, Any]:
    found, matrix, classes = tables.mistakes(details), tables.confusion(details), details["classes"]
    model = {"name": name, "classes": classes, "wrong": "", "matrix": None, "matrix_image": None, "confused": None}
    if found is not None:
        model["wrong"] = f"{found.wrong:g} of {found.samples:g} wrong"
        if matrix is not None and len(matrix) <= _MOST_CLASSES:
            model["matrix"] = [(classes[row], _cells(classes, row, values)) for row, values in enumerate(matrix)]
        else:
            model["confused"] = _confused(found, classes, _MOST_ROWS if matrix is None else _MOST_PAIRS)
    if matrix is not None and len(matrix) > _MOST_CLASSES:
        model["matrix_image"] = base64.b64encode(confusion_image(matrix, classes)).decode()
    return {**model, "samples": [_sample(sample, details) for sample in details["worst"]]}


def _confused(found: tables.Mistakes, classes: Sequence[str], most: int) -> Table:
    table = tables.confused(found, classes, most)
    rows = [
        [*names, f"{value:g}", None if share is None else f"{share * 100:.1f} %"] for *names, value, share in table.rows
    ]
    return Table(table.headers, rows, table.texts)


def _cells(classes: Sequence[str], row: int, values: Sequence[float]) -> list[dict[str, str]]:
    """A row of the confusion matrix; `share` is the cell's shade in percent."""
    total = sum(values) or 1
    return [
        {
            "kind": "hit" if row == column else "miss",
            # The eye should find a single mistake: their shades grow with the root.
            "share": f"{100 * (value / total if row == column else (value / total) ** 0.5):.0f}",
            "title": f"{classes[row]} taken for {classes[column]}: {value:g}",
            "text": f"{value:g}" if value else "",
        }
        for column, value in enumerate(values)
    ]


def _sample(sample: dict[str, Any], details: dict[str, Any]) -> dict[str, Any]:
    return {
        **sample,
        "target": tables.name_of(sample["target"], details),
        "decision": tables.name_of(sample["decision"], details),
        "known": sample["target"] is not None or sample["decision"] is not None,
        "right": sample["target"] == sample["decision"],
    }
