"""Prints the table of results at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dist_train.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

_ORDER = ("fp32", "bf16", "fp16", "ptq", "fake_quant", "int8")
_SHARES = ("exact_match", "map", "map50", "acc", "precision", "recall")


def result_table(results: dict[str, Any]) -> Table:
    """Makes a table with one row per model: metrics, size and latency; "-" where a value was not measured."""
    from rich.table import Table

    models: dict[str, dict[str, Any]] = results["models"]
    names = sorted(models, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
    metrics = list(
        dict.fromkeys(
            key
            for name in names
            for key, value in models[name].items()
            if isinstance(value, (int, float)) and key not in ("count", "bytes")
        )
    )
    batches = list(dict.fromkeys(size for name in names for size in models[name].get("latency_ms", {})))
    table = Table(title=f"{results['run']}: {results['world_size']} rank{'s' if results['world_size'] > 1 else ''}")
    table.add_column("model")
    for metric in [*metrics, "samples", "KiB", *(f"ms, batch {size}" for size in batches)]:
        table.add_column(printable(metric), justify="right")
    for name in names:
        figures = models[name]
        row = [shown_metric(metric, figures.get(metric)) for metric in metrics]
        row += [str(figures.get("count", "-")), f"{figures['bytes'] / 1024:,.1f}" if "bytes" in figures else "-"]
        row += [
            f"{figures['latency_ms'][size]:.3f}" if size in figures.get("latency_ms", {}) else "-" for size in batches
        ]
        table.add_row(printable(name), *row)
    return table


def print_results(results: dict[str, Any]) -> None:
    print_table(result_table(results))
    for line in _lines(results):
        print(printable(line))


def print_table(table: Table, width: int = 120) -> None:
    """Prints a table; where there is no terminal, with this width."""
    from rich.console import Console

    console = Console(markup=False)  # a name may have brackets
    # A log file has no width: long lines are better than cut words.
    (console if console.is_terminal else Console(width=width, markup=False)).print(table)


def _lines(results: dict[str, Any]) -> Iterator[str]:
    """Yields the lines under the table."""
    gates = results["gates"].items()
    yield from _remarks(results)
    if runtimes := _runtimes(results["models"]):
        yield f"latency: {runtimes}, one process"
    if gates:
        shown = (f"{gate_name(name, gate)} {gate['value']:.3g} (bound {gate['bound']:g})" for name, gate in gates)
        yield f"gates passed: {', '.join(shown)}"
    for name, reason in results.get("gates_skipped", {}).items():
        yield f"gate skipped: {name}: {reason}"


def _remarks(results: dict[str, Any]) -> list[str]:
    """Lists remarks to the figures: qat was left out, layers that stay float, simulated bits."""
    remarks = []
    for name, stage in results.get("stages", {}).items():
        if stage.get("left_out"):
            lost, budget = stage["ptq_lost_points"], stage["budget"]
            remarks.append(f"{name}: left out, as ptq loses {lost:.2f} points, within the budget of {budget:g}")
    int8 = results["models"].get("int8", {})
    if int8.get("weights", {}).get("float"):
        remarks.append(f"int8: {int8['weights']['said']}")
    bits = int8.get("simulated_bits")
    if bits:
        remarks.append(f"int8: simulates {' and '.join(map(str, bits))} bits where the rules say so")
    return remarks


def gate_name(name: str, gate: dict[str, Any]) -> str:
    """Returns the gate's name, with the runtime it was measured in, if that is another: "lowered in openvino"."""
    return f"{name} in {gate['runtime']}" if "runtime" in gate else name


def _runtimes(models: dict[str, dict[str, Any]]) -> str:
    """Names the runtime that timed the models; with several, each with its models, as their times do not compare."""
    ran: dict[str, list[str]] = {}
    for name, figures in models.items():
        if "runtime" in figures:
            ran.setdefault(figures["runtime"], []).append(name)
    if len(ran) < 2:
        return "".join(ran)
    return "; ".join(f"{', '.join(sorted(names))} in {runtime}" for runtime, names in sorted(ran.items()))


def shown_metric(name: str, value: Any) -> str:
    """Formats a metric: shares in percent; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value * 100:.2f} %" if is_share(name) else f"{value:.4f}"


def is_share(name: str) -> bool:
    """Tells by its name if a metric is a share: top1, accuracy, mean_iou, f1, exact_match, map, map50."""
    return name.startswith("top") or name in _SHARES or name.endswith(("accuracy", "iou", "f1"))
