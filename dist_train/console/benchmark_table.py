"""Prints the table of a benchmark: a row for each model, format and runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dist_train.console.results_table import print_table, shown_metric
from dist_train.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 190


def benchmark_table(results: dict[str, Any]) -> Table:
    """Makes the table; "-" where a value was not measured, "*" at formats that are not in export/."""
    from rich.table import Table

    sizes, metric = list(map(str, results["batch_sizes"])), results["metric"]
    table = Table(title=f"{results['run']}: {results['samples']:,} samples, threads: {results['threads']}")
    for header in ("model", "format", "runtime"):
        table.add_column(header)
    measured = ["KiB", metric, "agrees", *(f"ms, batch {size}" for size in sizes)]
    for header in [*measured, *(f"samples/s, batch {size}" for size in sizes)]:
        table.add_column(printable(header), justify="right")
    for row in results["rows"]:
        times = [row["latency_ms"].get(size) for size in sizes]
        rates = [row["throughput"].get(size) for size in sizes]
        table.add_row(
            row["model"],
            row["format"] + ("" if row["exported"] else " *"),
            printable(row["runtime"]),
            "-" if row["bytes"] is None else f"{row['bytes'] / 1024:,.1f}",
            shown_metric(metric, row["score"]),
            "-" if row["agreement"] is None else f"{row['agreement']:.2%}",
            *map(_milliseconds, times),
            *(_rate(each, row["at_once"].get(size, 1)) for size, each in zip(sizes, rates, strict=True)),
        )
    return table


def _milliseconds(spread: dict[str, float] | None) -> str:
    return "-" if spread is None else f"{spread['median']:.3g} ({spread['low']:.3g}-{spread['high']:.3g})"


def _rate(spread: dict[str, float] | None, at_once: int) -> str:
    if spread is None:
        return "-"
    return f"{spread['median']:,.0f}" + (f" ({at_once} at once)" if at_once > 1 else "")


def print_benchmark(results: dict[str, Any]) -> None:
    """Prints the table, the reasons of what was left out, and the notes."""
    print_table(benchmark_table(results), _WIDTH)
    print("ms: median and quartiles of calls one after the other; samples/s: all requests there from the beginning")
    if not all(row["exported"] for row in results["rows"]):
        print("* not in export/: written for this benchmark, and not kept")
    for row in results["rows"]:
        if row["left_out"]:
            print(printable(f"{row['model']} as {row['format']} in {row['runtime']}: {row['left_out']}"))
    for note in results["notes"]:
        print(printable(f"note: {note}"))
