"""Writes a report: report.html, plots as PNG, curves and tables as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from dist_train.errors import RunDirError
from dist_train.report import tables
from dist_train.report.charts import charts
from dist_train.report.draw import chart_images, confusion_image
from dist_train.report.page import page
from dist_train.report.read import RunRecord, read_runs
from dist_train.run_dir.files import replace_bytes, replace_json
from dist_train.run_dir.paths import RunDir

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
        contents[f"tables/{name}.csv"] = _csv(found)
    for number, run in enumerate(runs):
        prefix = f"run{number}-" if len(runs) > 1 else ""
        classes = tables.per_class(run)
        if classes is not None:
            contents[f"tables/{prefix}per_class.csv"] = _csv(classes)
        for model, details in run.details.items():
            contents[f"tables/{prefix}worst-{model}.csv"] = _csv(tables.worst(details))
            names, matrix, mistakes = details["classes"], tables.confusion(details), tables.mistakes(details)
            if matrix is not None:
                rows = [[name, *row] for name, row in zip(names, matrix, strict=True)]
                contents[f"tables/{prefix}confusion-{model}.csv"] = _csv(tables.Table(["target", *names], rows))
                contents[f"plots/{prefix}confusion-{model}.png"] = confusion_image(matrix, names)
            elif mistakes is not None:
                contents[f"tables/{prefix}confused-{model}.csv"] = _csv(tables.confused(mistakes, names, _MOST_PAIRS))
    contents["report.html"] = page(runs, [(chart, svg) for chart, svg, _ in drawn]).encode()
    return contents


def _csv(found: tables.Table) -> bytes:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([found.headers, *found.rows])
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
        names = json.loads((folder / _WRITTEN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise RunDirError(f"{folder / _WRITTEN} is damaged: {error}", "--output DIR, with a new folder") from error
    return [name for name in names if not Path(name).is_absolute() and ".." not in Path(name).parts]
