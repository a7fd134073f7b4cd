"""Builds the report's tables, for the page and for the CSV files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dist_train.console.results_table import gate_name, result_table
from dist_train.report.read import RunRecord

MATRIX_CLASSES = 256
"""The most classes of a confusion matrix that is drawn or written as a table: a cell has 5 pixels."""


@dataclass(frozen=True)
class Table:
    """Headers, and rows of as many values; None where a value was not measured.

    The first `texts` columns hold text, the others numbers.
    """

    headers: list[str]
    rows: list[list[Any]]
    texts: int = 1

    def without_run(self) -> Table:
        """The table of a single run: without its first column, the run's label."""
        return Table(self.headers[1:], [row[1:] for row in self.rows], self.texts - 1)


def shown_results(runs: Sequence[RunRecord]) -> Table:
    """Joins the runs' result tables, formatted as at the end of a run."""
    tables = [result_table({"run": "", "world_size": 1, "models": {}, **run.results}) for run in runs]
    columns = list(dict.fromkeys(str(column.header) for each in tables for column in each.columns))
    rows: list[list[Any]] = []
    for run, each in zip(runs, tables, strict=True):
        cells = {str(column.header): list(column.cells) for column in each.columns}
        for place in range(each.row_count):
            rows.append([run.label, *(cells[name][place] if name in cells else "-" for name in columns)])
    return Table(["run", *columns], rows, texts=2)


def results(runs: Sequence[RunRecord]) -> Table:
    """One row per model and figure, with all digits."""
    return Table(
        ["run", "model", "figure", "value"],
        [
            [run.label, model, *figure]
            for run in runs
            for model, figures in run.results.get("models", {}).items()
            for figure in _flat(figures)
        ],
    )


def _flat(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def curves(runs: Sequence[RunRecord]) -> Table:
    rows = [[run.label, p.stage, p.epoch, p.step, p.attempt, p.name, p.value] for run in runs for p in run.points]
    return Table(["run", "stage", "epoch", "step", "attempt", "name", "value"], rows)


def gates(runs: Sequence[RunRecord]) -> Table:
    return Table(
        ["run", "gate", "value", "bound", "passed"],
        [
            [run.label, gate_name(name, gate), gate.get("value"), gate.get("bound"), gate.get("passed")]
            for run in runs
            for name, gate in run.results.get("gates", {}).items()
        ],
        texts=2,
    )


def skipped_gates(runs: Sequence[RunRecord]) -> Table:
    """Gates that did not run, with the reason."""
    return Table(
        ["run", "gate", "why it did not run"],
        [[run.label, *each] for run in runs for each in run.results.get("gates_skipped", {}).items()],
        texts=3,
    )


def layers(runs: Sequence[RunRecord]) -> Table:
    """Signal-to-quantization-noise ratio of each int8 layer in dB, the worst of each run first."""
    return Table(
        ["run", "layer", "dB"],
        [[run.label, *each] for run in runs for each in run.results.get("layer_sqnr_db", {}).items()],
        texts=2,
    )


def stages(runs: Sequence[RunRecord]) -> Table:
    return Table(
        ["run", "stage", "steps", "seconds"],
        [
            [run.label, name, stage.get("steps"), stage.get("seconds")]
            for run in runs
            for name, stage in run.results.get("stages", {}).items()
        ],
        texts=2,
    )


def confusion(details: dict[str, Any]) -> list[list[float]] | None:
    """Returns a model's confusion matrix, [target][decision]; None for a task without one and above MATRIX_CLASSES."""
    matrix = _matrix(details)
    return matrix if matrix is not None and len(matrix) <= MATRIX_CLASSES else None


def _matrix(details: dict[str, Any]) -> list[list[float]] | None:
    matrix = details["metrics"].get("confusion")
    classes = len(details["classes"])
    square = isinstance(matrix, list) and len(matrix) == classes and all(_has(row, classes) for row in matrix)
    return matrix if square else None


@dataclass(frozen=True)
class Mistakes:
    """The classes that a model takes for each other.

    Attributes:
        pairs: target, decision, samples, and all samples of the target's class; most samples first.
        num_pairs: pairs that occur; more than `pairs` where the run listed only the worst.
    """

    samples: float
    wrong: float
    pairs: list[tuple[int, int, float, float]]
    num_pairs: int


def mistakes(details: dict[str, Any]) -> Mistakes | None:
    """Returns a model's mistakes; None where its task does not decide for one of several classes with names."""
    metrics, matrix = details["metrics"], _matrix(details)
    if "confused_pairs" in metrics and details["classes"]:
        pairs = [(target, decision, value, total) for target, decision, value, total in metrics["confused_pairs"]]
        return Mistakes(metrics["num_samples"], metrics["num_wrong"], pairs, metrics["num_pairs"])
    if matrix is None:
        return None
    totals = [sum(row) for row in matrix]
    pairs = [
        (row, column, value, totals[row])
        for row, values in enumerate(matrix)
        for column, value in enumerate(values)
        if row != column and value
    ]
    pairs.sort(key=lambda pair: (-pair[2], pair[:2]))
    return Mistakes(sum(totals), sum(pair[2] for pair in pairs), pairs, len(pairs))


def per_class(run: RunRecord) -> Table | None:
    """One row per class, one column per model and class metric; None where the task has no such metric."""
    columns: dict[str, list[Any]] = {}
    classes: list[str] = []
    for model, details in run.details.items():
        for name, values in details["metrics"].items():
            if details["classes"] and _has(values, len(details["classes"])) and not isinstance(values[0], list):
                columns[model if name == "per_class" else f"{model} {name}"] = values
                classes = details["classes"]
    if not columns:
        return None
    rows = [[label, *(column[place] for column in columns.values())] for place, label in enumerate(classes)]
    return Table(["class", *columns], rows)


def confused(found: Mistakes, classes: Sequence[str], most: int) -> Table:
    """Lists the classes that were most often taken for each other; a last row sums up the pairs that are left out."""
    pairs = found.pairs[:most]
    rows: list[list[Any]] = [
        [classes[target], classes[decision], value, value / total] for target, decision, value, total in pairs
    ]
    if found.num_pairs > len(pairs):
        others = f"({found.num_pairs - len(pairs)} other pairs)"
        rows.append([others, others, found.wrong - sum(pair[2] for pair in pairs), None])
    return Table(["target", "decision", "samples", "of the class"], rows, texts=2)


def worst(details: dict[str, Any]) -> Table:
    rows = [
        [sample["id"], sample["loss"], name_of(sample["target"], details), name_of(sample["decision"], details)]
        for sample in details["worst"]
    ]
    return Table(["id", "loss", "target", "decision"], rows)


def name_of(value: Any, details: dict[str, Any]) -> str:
    """Formats a target or a decision: a class by its name, where the task is a classification."""
    if value is None:
        return "-"
    classes = details["classes"]
    one_class = "confused_pairs" in details["metrics"] or _matrix(details) is not None
    if isinstance(value, int) and not isinstance(value, bool) and one_class and 0 <= value < len(classes):
        return str(classes[value])
    if isinstance(value, list):
        return ", ".join(name_of(each, {"classes": [], "metrics": {}}) for each in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def settings(runs: Sequence[RunRecord]) -> Table:
    """Lists the settings in which the runs differ."""
    flat = [dict(_flat(run.config)) for run in runs]
    names = dict.fromkeys(name for each in flat for name in each)
    different = [name for name in names if any(each.get(name) != flat[0].get(name) for each in flat)]
    return _by_run("setting", runs, flat, different)


def environment(runs: Sequence[RunRecord]) -> Table:
    flat = [dict(_flat(run.environment)) for run in runs]
    return _by_run("", runs, flat, dict.fromkeys(name for each in flat for name in each))


def _by_run(header: str, runs: Sequence[RunRecord], flat: Sequence[dict[str, Any]], names: Iterable[str]) -> Table:
    rows = [[name, *(each.get(name) for each in flat)] for name in names]
    return Table([header, *(run.label for run in runs)], rows, texts=1 + len(runs))


def _has(value: Any, size: int) -> bool:
    return isinstance(value, list) and len(value) == size
