"""The page: one file that asks nothing of any other, in light and dark, on a phone and on paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import yaml

from dist_train.report import tables
from dist_train.report.charts import Chart
from dist_train.report.details import details_section
from dist_train.report.draw import SERIES
from dist_train.report.html import Html, element, folded, section, table, text
from dist_train.report.read import RunRecord

# The browser itself refuses whatever would leave the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_STATES = {"done": "good", "running": "busy", "preempted": "busy", "failed": "bad"}


def page(runs: Sequence[RunRecord], drawn: Sequence[tuple[Chart, str]]) -> str:
    """The whole page; `drawn` are the charts with their SVG elements."""
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    body = [
        _header(title, runs),
        _tiles(runs[0]) if len(runs) == 1 else "",
        _results(runs),
        _gates(runs),
        *_curves(drawn),
        *(details_section(run, len(runs) > 1) for run in runs if run.details),
        _settings(runs),
        _environment(runs),
    ]
    head = [
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Html('<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'),
        element("title", f"{title} - dist-train report"),
        element("style", Html(_file("page.css"))),
    ]
    script = element("script", Html(_file("page.js")))
    return f'<!doctype html>\n<html lang="en">{element("head", *head)}{element("body", element("main", *body), script)}</html>\n'


def _file(name: str) -> str:
    return files("dist_train.report").joinpath(name).read_text(encoding="utf-8")


def _header(title: str, runs: Sequence[RunRecord]) -> Html:
    several = len(runs) > 1
    chips = []
    for number, run in enumerate(runs):
        state = element("span", run.state, class_=f"state {_STATES.get(run.state, 'busy')}")
        world = run.environment.get("world_size")
        facts = " · ".join(
            str(fact)
            for fact in (
                run.config.get("model", {}).get("name"),
                run.config.get("data", {}).get("name"),
                world and f"{world} rank{'s' if world > 1 else ''}",
                run.environment.get("gpu") or run.environment.get("device"),
            )
            if fact
        )
        where = "" if run.state == "done" else f"{run.status.get('stage')}, step {run.status.get('step')}"
        name = (
            element(
                "button",
                element("span", class_="swatch", style=f"background:var(--series-{number % len(SERIES)})"),
                run.label,
                type="button",
                aria_pressed="true",
                data_run=str(number),
                title="show or hide its curves",
            )
            if several
            else ""
        )
        chips.append(
            element("p", name, " ", state, " ", element("span", facts, where and f" · {where}", class_="facts"))
        )
        if run.status.get("error"):
            chips.append(element("pre", run.status["error"], class_="error"))
    return element("header", element("h1", title), *chips)


def _tiles(run: RunRecord) -> Html:
    models, gates = run.results.get("models", {}), run.results.get("gates", {})
    shown = tables.shown_results([run])
    made = []
    for row in {row[1]: row for row in (*shown.rows[:1], *shown.rows[-1:])}.values():
        figures = dict(zip(shown.headers, row, strict=True))
        if figures["samples"] != "-":
            made.append((shown.headers[2] + ", " + figures["model"], row[2], f"{figures['samples']} samples"))
    sizes = [models.get(name, {}).get("bytes") for name in ("fp32", "int8")]
    if all(sizes):
        made.append(
            ("size", f"{sizes[0] / sizes[1]:.2f} x smaller", f"{sizes[0] / 1024:,.0f} to {sizes[1] / 1024:,.0f} KiB")
        )
    weights = models.get("int8", {}).get("weights")
    if weights is not None:
        made.append(("int8", f"{math.floor(weights['share'] * 1000) / 10:g} % of the weights", _left_float(weights)))
    if gates:
        passed = sum(bool(gate.get("passed")) for gate in gates.values())
        skipped = [f"{name} skipped" for name in run.results.get("gates_skipped", {})]
        made.append(("gates", f"{passed} of {len(gates)} passed", ", ".join([*gates, *skipped])))
    return element(
        "div",
        *(
            element("div", element("span", name), element("strong", value), element("small", note), class_="tile")
            for name, value, note in made
        ),
        class_="tiles",
    )


def _left_float(weights: dict[str, Any]) -> str:
    """The largest modules whose weights are no integers."""
    names = list(weights["float_modules"])
    return f"floating point: {', '.join(names[:3])}" + (" and more" if names[3:] else "") if names else "all of them"


def _results(runs: Sequence[RunRecord]) -> Html:
    shown = tables.shown_results(runs)
    if not shown.rows:
        return section("Results", element("p", "No model is finished yet.", class_="note"))
    several = len(runs) > 1
    headers, rows = (shown.headers, shown.rows) if several else (shown.headers[1:], [row[1:] for row in shown.rows])
    runtimes = sorted(
        {figures["runtime"] for run in runs for figures in run.results["models"].values() if "runtime" in figures}
        if all(run.results for run in runs)
        else set()
    )
    note = element("p", f"Latency: {', '.join(runtimes)}, one process.", class_="note") if runtimes else ""
    return section("Results", table(headers, rows, left=2 if several else 1), note)


def _gates(runs: Sequence[RunRecord]) -> Html:
    found = tables.gates(runs)
    if not found.rows:
        return Html("")
    first = 0 if len(runs) > 1 else 1
    rows = [
        [
            *row[first:2],
            "not finite" if row[2] is None else f"{row[2]:.3g}",
            f"{row[3]:g}",
            element("span", "passed" if row[4] else "failed", class_=f"state {'good' if row[4] else 'bad'}"),
        ]
        for row in found.rows
    ]
    skipped = tables.skipped_gates(runs)
    more = table(skipped.headers[first:], [row[first:] for row in skipped.rows], left=3 - first) if skipped.rows else ""
    return section("Gates", table(found.headers[first:], rows, left=2 - first), more, _layers(runs))


def _layers(runs: Sequence[RunRecord]) -> Html:
    found = tables.layers(runs)
    if not found.rows:
        return Html("")
    first = 0 if len(runs) > 1 else 1
    rows = [[*row[first:2], row[2] if isinstance(row[2], str) else f"{row[2]:.1f}"] for row in found.rows]
    title = (
        "Signal to quantization noise of each int8 layer, against fake quantization on the same inputs; the worst first"
    )
    return folded(title, table(found.headers[first:], rows, left=2 - first))


def _curves(drawn: Sequence[tuple[Chart, str]]) -> list[Html]:
    stages = dict.fromkeys(chart.stage for chart, _ in drawn)
    return [
        section(
            f"Curves: {stage}",
            element(
                "div",
                *(element("figure", Html(svg)) for chart, svg in drawn if chart.stage == stage),
                class_="charts",
            ),
        )
        for stage in stages
    ]


def _settings(runs: Sequence[RunRecord]) -> Html:
    parts: list[Any] = []
    if len(runs) > 1:
        found = tables.settings(runs)
        parts.append(table(found.headers, _shown(found.rows), left=len(found.headers)))
    for run in runs:
        written = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        parts.append(folded(f"config.yaml of {run.label}", element("pre", written)))
    parts.append(_stages(runs))
    return section("Configuration", *parts)


def _stages(runs: Sequence[RunRecord]) -> Html:
    found = tables.stages(runs)
    first = 0 if len(runs) > 1 else 1
    if not found.rows:
        return Html("")
    return table(found.headers[first:], [row[first:] for row in _shown(found.rows)], left=2 - first)


def _environment(runs: Sequence[RunRecord]) -> Html:
    found = tables.environment(runs)
    return section("Environment", table(found.headers, _shown(found.rows), left=len(found.headers), class_="facts"))


def _shown(rows: Sequence[Sequence[Any]]) -> list[list[Html]]:
    return [[text("-" if value is None else value) for value in row] for row in rows]
