"""Writes a report: report.html, plots as PNG, curves and tables as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from dist_train.errors import RunDirError, csv_cell
from dist_train.report import tables
from dist_train.report.charts import charts
from dist_train.report.draw import chart_images, confusion_image
from dist_train.report.page import page
from dist_train.report.read import RunRecord, read_runs
from dist_train.run_dir.files import replace_bytes, replace_json
from dist_train.run_dir.paths import RunDir
from dist_train.untrusted import read_json_file

_MOST_PAIRS = 1000  # of classes, in a CSV in place of a matrix
_WRITTEN = ".written.json"  # lists our files: others are not overwritten or removed


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Writes a report of the runs and returns the page's path.

    `output` defaults to the run's own report/; for several runs, to report/ in the current directory.

    Raises:
        RunDirError: a directory holds no run, or `output` has files of the same names that are not ours.
    """
    runs = read_runs(paths)
    folder = output or (RunDir(paths[0]).report if len(runs) == 1 else Path("report"))
    _put(folder, _contents(runs))
    return folder / "report.html"


def _contents(runs: Sequence[RunRecord]) -> dict[str, bytes]:
    """Builds the report's files: content by name."""
    labels = [run.label for run in runs]
    drawn = [(chart, *chart_images(chart, labels)) for chart in charts(runs)]
    contents = {f"plots/{chart.name}.png": png for chart, _, png in drawn}
    for name, found in (
        ("curves", tables.curves(runs)),
        ("results", tables.results(runs)),
        ("gates", tables.gates(runs)),
        ("gates_skipped", tables.skipped_gates(runs)),
        ("layers", tables.layers(runs)),
        ("stages", tables.stages(runs)),
    ):
        contents[f"tables/{name}.csv"] = csv_bytes(found)
    for number, run in enumerate(runs):
        prefix = f"run{number}-" if len(runs) > 1 else ""
        classes = tables.per_class(run)
        if classes is not None:
            contents[f"tables/{prefix}per_class.csv"] = csv_bytes(classes)
        for model, details in run.details.items():
            contents[f"tables/{prefix}worst-{model}.csv"] = csv_bytes(tables.worst(details))
            names, matrix, mistakes = details["classes"], tables.confusion(details), tables.mistakes(details)
            if matrix is not None:
                rows = [[name, *row] for name, row in zip(names, matrix, strict=True)]
                contents[f"tables/{prefix}confusion-{model}.csv"] = csv_bytes(tables.Table(["target", *names], rows))
                contents[f"plots/{prefix}confusion-{model}.png"] = confusion_image(matrix, names)
            elif mistakes is not None:
                contents[f"tables/{prefix}confused-{model}.csv"] = csv_bytes(
                    tables.confused(mistakes, names, _MOST_PAIRS)
                )
    contents["report.html"] = page(runs, [(chart, svg) for chart, svg, _ in drawn]).encode()
    return contents


def csv_bytes(found: tables.Table) -> bytes:
    """Writes a table as CSV; texts that a spreadsheet would compute begin with an apostrophe."""
    file = io.StringIO()
    rows = [[csv_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in [found.headers, *found.rows]]
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue().encode()


def _put(folder: Path, contents: dict[str, bytes]) -> None:
    ours = set(_ours(folder))
    for name in contents:
        if name not in ours and (folder / name).exists():
            raise RunDirError(
                f"{folder / name} was not written by dist-train report, and is not overwritten",
                "--output DIR, with a new folder",
            )
    try:
        for name in ours - set(contents):
            (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        replace_json(folder / _WRITTEN, sorted(ours | set(contents)))
        for name, content in contents.items():
            (folder / name).parent.mkdir(exist_ok=True)
            replace_bytes(folder / name, content)
    except OSError as error:
        raise RunDirError(f"{folder} cannot be written: {error}", "--output DIR, one that you can write to") from error


def _ours(folder: Path) -> list[str]:
    """Lists the files of an earlier report in this folder; names that lead out of it are ignored."""
    try:
        names = read_json_file(folder / _WRITTEN)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise RunDirError(f"{folder / _WRITTEN} is damaged: {error}", "--output DIR, with a new folder") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RunDirError(f"{folder / _WRITTEN} is damaged: it is no list of names", "--output DIR, with a new folder")
    return [
        name for name in names if "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
    ]
