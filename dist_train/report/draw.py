"""Draws charts as SVG, which follows the page's colours in light and dark, and as PNG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dist_train.console.results_table import is_share
from dist_train.report.charts import Chart, Curve

# PNGs use these colours. In an SVG each becomes a variable that the style sheet sets for light and dark.
SERIES = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
_INK, _MUTED, _GRID = "#1c2330", "#667085", "#e4e7ec"
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "line"} | {c: f"series-{n}" for n, c in enumerate(SERIES)}
_LOGARITHMIC = 30.0  # a loss that spans more than this factor is drawn on a logarithmic axis
_STYLE: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a name may have a dollar sign
    "svg.fonttype": "none",
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "text.color": _INK,
    "axes.titlelocation": "left",
}


def chart_images(chart: Chart, runs: Sequence[str]) -> tuple[Markup, bytes]:
    """Draws a chart as an SVG element and as a PNG; `runs` are the runs' labels."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": chart.name}):
        figure = Figure(figsize=(4.5, 2.5), layout="constrained")
        _draw(figure, chart, runs)
        return _svg(figure, f"{chart.stage}: {chart.title}"), _png(figure)


def _draw(figure: Figure, chart: Chart, runs: Sequence[str]) -> None:
    axes = figure.subplots()
    kinds = list(dict.fromkeys(curve.kind for curve in chart.curves))
    several = len(runs) > 1
    for number, curve in enumerate(chart.curves):
        colour = SERIES[(curve.run if several else kinds.index(curve.kind)) % len(SERIES)]
        (line,) = axes.plot(
            curve.steps,
            [math.nan if value is None else value for value in curve.values],
            color=colour,
            **_look(curve, kinds, several),
        )
        line.set_gid(f"run{curve.run}-{chart.name}-{number}")
    axes.set_title(chart.title, fontsize=10, fontweight="bold", color=_INK, pad=8)
    axes.set_xlabel("step", color=_MUTED, fontsize=8)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _scale(axes, chart)
    _legend(figure, kinds, runs)


def _look(curve: Curve, kinds: Sequence[str], several: bool) -> dict[str, Any]:
    if not curve.evaluated:
        faint = several and len(kinds) > 1
        single = {"marker": "."} if len(curve.steps) == 1 else {}  # a line through one point cannot be seen
        return {"linewidth": 1.2 if faint else 1.6, "alpha": 0.5 if faint else 1.0, **single}
    other = kinds.index(curve.kind) > 1
    return {"linewidth": 1.6, "marker": "s" if other else "o", "markersize": 3.5, "linestyle": "--" if other else "-"}


def _scale(axes: Axes, chart: Chart) -> None:
    values = [value for curve in chart.curves for value in curve.values if value is not None]
    if chart.title == "loss" and values and min(values) > 0 and max(values) / min(values) > _LOGARITHMIC:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(values) / min(values) < 1000 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value * 100:g} %" if chart.percent else _short(value))
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _legend(figure: Figure, kinds: Sequence[str], runs: Sequence[str]) -> None:
    several = len(runs) > 1
    handles: list[Line2D] = []
    if several:
        for number, label in enumerate(runs):
            handles.append(Line2D([], [], color=SERIES[number % len(SERIES)], linewidth=2, label=_cut(label)))
    if kinds[1:]:
        for place, kind in enumerate(kinds):
            look = _look(Curve(0, kind, [], []), kinds, several)
            handles.append(Line2D([], [], color=_MUTED if several else SERIES[place % len(SERIES)], label=kind, **look))
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=min(len(handles), 5),
            frameon=False,
            fontsize=8,
            handlelength=1.6,
            columnspacing=1.4,
            labelcolor=_MUTED,
        )


def _cut(label: str) -> str:
    return label if len(label) <= 18 else f"{label[:17]}…"


def confusion_image(matrix: Sequence[Sequence[float]], classes: Sequence[str]) -> bytes:
    """Draws a confusion matrix as a PNG: rows are targets, a cell's shade is its share of the row."""
    shares = [[value / max(1, sum(row)) for value in row] for row in matrix]
    with matplotlib.rc_context(_STYLE):
        size = min(9.0, max(3.2, 0.34 * len(matrix)))
        figure = Figure(figsize=(size + 0.6, size), layout="constrained")
        axes = figure.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_xlabel("decision", color=_MUTED)
        axes.set_ylabel("target", color=_MUTED)
        if len(matrix) <= 24:
            ticks = range(len(matrix))
            axes.set_xticks(ticks, [_cut(name) for name in classes], rotation=90 if max(map(len, classes)) > 3 else 0)
            axes.set_yticks(ticks, [_cut(name) for name in classes])
            for row, values in enumerate(matrix):
                for column, value in enumerate(values):
                    if value:
                        ink = "white" if shares[row][column] > 0.5 else _INK
                        axes.text(column, row, f"{value:g}", ha="center", va="center", fontsize=7, color=ink)
        return _png(figure)


_MARKERS = "os^DvP*X"


def points_image(rows: Sequence[dict[str, Any]], sizes: Sequence[str], metric: str) -> bytes:
    """Draws a benchmark as a PNG: a panel for each batch size, and in it a point for each row that was timed.

    rows: of the benchmark's results. A colour is a model, a marker a format with its runtime.
    """
    timed = [row for row in rows if row["latency_ms"] and row["score"] is not None]
    models = list(dict.fromkeys(row["model"] for row in timed))
    kinds = list(dict.fromkeys(_kind(row) for row in timed))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(1.2 + 3.4 * len(sizes), 3.8), layout="constrained")
        panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        for axes, size in zip(panels, sizes, strict=True):
            for row in timed:
                axes.plot(
                    row["latency_ms"][size]["median"],
                    row["score"],
                    marker=_MARKERS[kinds.index(_kind(row)) % len(_MARKERS)],
                    color=SERIES[models.index(row["model"]) % len(SERIES)],
                    linestyle="",
                    alpha=0.8,
                )
            axes.set_title(f"batch {size}", fontsize=10, fontweight="bold", color=_INK, pad=8)
            axes.set_xlabel("ms, median", color=_MUTED, fontsize=8)
            axes.set_xscale("log")
            axes.grid(color=_GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(length=0, labelsize=8)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
        panels[0].set_ylabel(metric, color=_MUTED, fontsize=8)
        if is_share(metric):
            panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %"))
        labels = [(SERIES[place % len(SERIES)], "s", name) for place, name in enumerate(models)]
        labels += [(_MUTED, _MARKERS[place % len(_MARKERS)], kind) for place, kind in enumerate(kinds)]
        figure.legend(
            handles=[Line2D([], [], color=c, marker=m, linestyle="", label=_cut(name)) for c, m, name in labels],
            loc="outside lower center",
            ncols=4,
            frameon=False,
            fontsize=8,
            labelcolor=_MUTED,
        )
        return _png(figure)


def _kind(row: dict[str, Any]) -> str:
    runtime = row["runtime"].partition(" ")[0]
    return runtime if runtime == row["format"] else f"{row['format']}, {runtime}"


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def _svg(figure: Figure, title: str) -> Markup:
    file = io.StringIO()
    figure.savefig(
        file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    text = file.getvalue()
    text = re.sub(r"<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))
