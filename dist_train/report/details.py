"""The part of the page about single classes and samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_train.report import tables
from dist_train.report.draw import confusion_image
from dist_train.report.html import Html, element, folded, image, section, table
from dist_train.report.read import RunRecord

_MOST_CLASSES = 24  # of a confusion matrix that can be read as a table
_MOST_ROWS = 40


def details_section(run: RunRecord, several: bool) -> Html:
    """Per-class numbers of all models, and of each model the confusion matrix and the worst-classified samples."""
    last = list(run.details)[-1]
    return section(
        f"Classes and samples: {run.label}" if several else "Classes and samples",
        _per_class(run),
        *(folded(_title(name, run), *_model(details), opened=name == last) for name, details in run.details.items()),
    )


def _title(name: str, run: RunRecord) -> Html:
    matrix = tables.confusion(run.details[name])
    if matrix is None:
        return element("b", name)
    count = sum(map(sum, matrix))
    wrong = count - sum(row[place] for place, row in enumerate(matrix))
    return Html(element("b", name) + element("span", f" {wrong:g} of {count:g} wrong", class_="facts"))


def _per_class(run: RunRecord) -> Html:
    found = tables.per_class(run)
    if found is None:
        return Html("")
    rows, note = found.rows, ""
    if len(rows) > _MOST_ROWS:
        rows = sorted(rows, key=lambda row: (row[-1] is None, row[-1]))[:_MOST_ROWS]
        note = element(
            "p", f"The {_MOST_ROWS} worst of {len(found.rows)} classes, by {found.headers[-1]}.", class_="note"
        )
    shown = [[row[0], *map(_bar, row[1:])] for row in rows]
    return Html(element("h3", "Accuracy per class") + table(found.headers, shown, class_="bars") + note)


def _bar(value: Any) -> Html | str:
    if not isinstance(value, (int, float)):
        return "-"
    if not 0 <= value <= 1:
        return f"{value:.4g}"
    return element(
        "span",
        element("span", class_="fill", style=f"width:{value * 100:.1f}%"),
        element("span", f"{value * 100:.1f} %", class_="figure"),
        class_="bar",
    )


def _model(details: dict[str, Any]) -> list[Html]:
    parts = []
    matrix = tables.confusion(details)
    if matrix is not None:
        parts.append(element("h3", "Confusion matrix"))
        if len(matrix) <= _MOST_CLASSES:
            parts.append(_matrix(matrix, details["classes"]))
        else:
            png = confusion_image(matrix, details["classes"])
            parts.append(image(png, "confusion matrix: rows are targets, columns decisions", "matrix"))
            found = tables.confused(matrix, details["classes"])
            rows = [[*row[:2], f"{row[2]:g}", f"{row[3] * 100:.1f} %"] for row in found.rows]
            parts.append(table(found.headers, rows, left=2))
    if details["worst"]:
        parts.append(element("h3", "Samples with the largest loss"))
        parts.append(element("div", *(_sample(sample, details) for sample in details["worst"]), class_="samples"))
    return parts


def _matrix(matrix: Sequence[Sequence[float]], classes: Sequence[str]) -> Html:
    lines = [
        element("tr", element("th", "target \\ decision"), *(element("th", name, scope="col") for name in classes))
    ]
    for row, values in enumerate(matrix):
        total = sum(values) or 1
        cells = [
            element(
                "td",
                f"{value:g}" if value else "",
                # The eye should find a single mistake: their shades grow with the root.
                class_="hit" if row == column else "miss",
                style=f"--share:{100 * (value / total if row == column else (value / total) ** 0.5):.0f}%",
                title=f"{classes[row]} taken for {classes[column]}: {value:g}",
            )
            for column, value in enumerate(values)
        ]
        lines.append(element("tr", element("th", classes[row], scope="row"), *cells))
    return element("div", element("table", *lines, class_="confusion"), class_="scroll")


def _sample(sample: dict[str, Any], details: dict[str, Any]) -> Html:
    target, decision = (tables.name_of(sample[key], details) for key in ("target", "decision"))
    right = sample["target"] == sample["decision"]
    picture = (
        image(sample["image"], f"sample {sample['id']}", "sample")
        if sample["image"]
        else element("div", "no image", class_="sample none")
    )
    answer = element("span", decision, class_="right" if right else "wrong")
    known = sample["target"] is not None or sample["decision"] is not None
    caption = [element("b", target, " → ", answer)] if known else []
    caption.append(element("small", f"loss {sample['loss']:.3g}, id {sample['id']}"))
    return element("figure", picture, element("figcaption", *caption))
