"""Fills page.html: one file that loads nothing else, for light and dark, narrow windows and paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dist_train.report import tables
from dist_train.report.charts import Chart
from dist_train.report.details import run_details
from dist_train.report.draw import SERIES
from dist_train.report.read import RunRecord
from dist_train.report.tables import Table

_STATES = {"done": "good", "running": "busy", "preempted": "busy", "failed": "bad"}


def page(runs: Sequence[RunRecord], drawn: Sequence[tuple[Chart, Markup]]) -> str:
    """Returns the page as HTML; `drawn` are the charts with their SVG elements."""
    several = len(runs) > 1

    def shown(found: Table) -> Table:
        return found if several else found.without_run()

    stages = dict.fromkeys(chart.stage for chart, _ in drawn)
    environment = Environment(
        loader=PackageLoader("dist_train.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=f"{len(runs)} runs" if several else runs[0].label,
        several=several,
        headings=[_heading(number, run) for number, run in enumerate(runs)],
        tiles=[] if several else _tiles(runs[0]),
        results=shown(tables.shown_results(runs)),
        runtimes=_runtimes(runs),
        gates=shown(_formatted_gates(runs)),
        skipped_gates=shown(tables.skipped_gates(runs)),
        layers=shown(_formatted_layers(runs)),
        charts={stage: [svg for chart, svg in drawn if chart.stage == stage] for stage in stages},
        details=[run_details(run) for run in runs if run.details],
        settings=tables.settings(runs),
        configs=[(run.label, yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)) for run in runs],
        stages=shown(tables.stages(runs)),
        environment=tables.environment(runs),
    )


def _heading(number: int, run: RunRecord) -> dict[str, Any]:
    world = run.environment.get("world_size")
    facts = (
        (run.config.get("model") or {}).get("name"),
        (run.config.get("data") or {}).get("name"),
        world and f"{world} rank{'s' if world > 1 else ''}",
        run.environment.get("gpu") or run.environment.get("device"),
        "" if run.state == "done" else f"{run.status.get('stage')}, step {run.status.get('step')}",
    )
    return {
        "label": run.label,
        "colour": number % len(SERIES),
        "state": run.state,
        "kind": _STATES.get(run.state, "busy"),
        "facts": " · ".join(str(fact) for fact in facts if fact),
        "error": run.status.get("error"),
    }


def _tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    """The figures at the top: name, value and a note each."""
    models, gates = run.results.get("models", {}), run.results.get("gates", {})
    found = tables.shown_results([run])
    made = []
    for row in {row[1]: row for row in (*found.rows[:1], *found.rows[-1:])}.values():
        figures = dict(zip(found.headers, row, strict=True))
        if figures["samples"] != "-":
            made.append((found.headers[2] + ", " + figures["model"], row[2], f"{figures['samples']} samples"))
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
    return made


def _left_float(weights: dict[str, Any]) -> str:
    """Names the largest modules that keep floating-point weights."""
    names = list(weights["float_modules"])
    return f"floating point: {', '.join(names[:3])}" + (" and more" if names[3:] else "") if names else "all of them"


def _runtimes(runs: Sequence[RunRecord]) -> list[str]:
    """The runtimes that measured the latencies; none while a run has no results."""
    if not all(run.results for run in runs):
        return []
    models = [figures for run in runs for figures in run.results["models"].values()]
    return sorted({figures["runtime"] for figures in models if "runtime" in figures})


def _formatted_gates(runs: Sequence[RunRecord]) -> Table:
    found = tables.gates(runs)
    rows = [
        [*names, "not finite" if value is None else f"{value:.3g}", f"{bound:g}", bool(passed)]
        for *names, value, bound, passed in found.rows
    ]
    return Table(found.headers, rows, found.texts)


def _formatted_layers(runs: Sequence[RunRecord]) -> Table:
    found = tables.layers(runs)
    rows = [[*names, value if isinstance(value, str) else f"{value:.1f}"] for *names, value in found.rows]
    return Table(found.headers, rows, found.texts)
