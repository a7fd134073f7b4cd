"""Builds the files of a benchmark: JSON, CSV, and a picture of accuracy against latency."""

from __future__ import annotations

import json
from typing import Any

from dist_train.report.tables import Table

_TEXTS = ("model", "format", "runtime", "exported")

FILES = ("benchmark.json", "benchmark.csv", "benchmark.png")
"""The names of all files."""


def benchmark_files(results: dict[str, Any]) -> dict[str, bytes]:
    """Returns the content of each file. results: as `finished_run.benchmark.benchmark_run` returns them."""
    # matplotlib, which draw imports, takes a second.
    from dist_train.report.draw import points_image
    from dist_train.report.write import csv_bytes

    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    picture = points_image(results["rows"], list(map(str, results["batch_sizes"])), results["metric"])
    return dict(zip(FILES, (text.encode(), csv_bytes(rows_table(results)), picture), strict=True))


def rows_table(results: dict[str, Any]) -> Table:
    """Returns a row for each model, format and runtime, with all digits."""
    sizes = list(map(str, results["batch_sizes"]))
    spreads = [(name, size) for name in ("latency_ms", "throughput") for size in sizes]
    headers = [*_TEXTS, "bytes", results["metric"], "agreement", "difference"]
    headers += [f"{name}_{size}{end}" for name, size in spreads for end in ("", "_low", "_high")]
    rows = [
        [
            *(row[name] for name in _TEXTS),
            *(row[name] for name in ("bytes", "score", "agreement", "difference")),
            *(row[name].get(size, {}).get(key) for name, size in spreads for key in ("median", "low", "high")),
            row["left_out"],
        ]
        for row in results["rows"]
    ]
    return Table([*headers, "left_out"], rows, texts=len(_TEXTS))
