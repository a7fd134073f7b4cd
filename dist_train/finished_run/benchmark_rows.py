"""The rows of a benchmark: a model in each format, opened in each runtime."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dist_train import registry, trees
from dist_train.artifact.bundle import write_format
from dist_train.artifact.deployable import Deployable
from dist_train.errors import ArtifactError
from dist_train.lowering.base import LoweringUnavailable, Written
from dist_train.lowering.latency import OneByOne, Spread
from dist_train.lowering.runtimes import RUNTIMES, Opened, Runtime, program_runtimes
from dist_train.trees import Tree


@dataclass(kw_only=True)
class Row:
    """A model in a format and a runtime.

    Attributes:
        exported: True for the file in `export/`; False for one that was written in memory, for this benchmark.
        score: the task's headline metric on the samples.
        agreement: share of the samples for which it decides as the model in memory.
        difference: largest difference of outputs, in units of the largest output.
        latency_ms, throughput: milliseconds a call and samples per second, by batch size.
        at_once: batches that are computed at once while the throughput is measured, by batch size.
        left_out: the reason why something was not measured; "" where everything was.
        opened: the model in its runtime; None where it cannot be opened.
    """

    model: str
    format: str
    runtime: str
    exported: bool
    bytes: int | None = None
    score: float | None = None
    agreement: float | None = None
    difference: float | None = None
    latency_ms: dict[str, Spread] = field(default_factory=dict)
    throughput: dict[str, Spread] = field(default_factory=dict)
    at_once: dict[str, int] = field(default_factory=dict)
    left_out: str = ""
    opened: Opened | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns all fields but `opened`; numbers that are not finite, such as a metric of no samples, become None."""
        fields = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(self).items()
            if name != "opened"
        }
        spreads = {name: {size: asdict(each) for size, each in getattr(self, name).items()} for name in _MEASURED}
        return fields | spreads


_MEASURED = ("latency_ms", "throughput")


def rows_of(
    model: Deployable,
    formats: Sequence[str],
    exported: Mapping[str, Any],
    files: Mapping[str, bytes],
    probe: Tree,
    threads: int,
) -> Iterator[Row]:
    """Yields a row for each format and runtime of a model.

    Args:
        exported: the manifest's entry of the model; {} where it was not exported.
        files: of the artifact.
    """
    for name in formats:
        if name == "pt2":
            there, contents = "file" in exported, [model.program.data]
            runtimes = program_runtimes(model.program)
        elif name in exported.get("formats", {}) and name in RUNTIMES:
            there, contents = True, [files[file] for file in exported["formats"][name]["files"]]
            runtimes = RUNTIMES[name]
        elif registry.export_formats.entry(name).missing():
            continue
        else:
            try:
                written = write_format(model, name, probe, threads)
            except ArtifactError as reason:
                yield Row(model=model.name, format=name, runtime="-", exported=False, left_out=reason.message)
                continue
            there, contents = False, list(written.files.values())
            runtimes = RUNTIMES.get(name) or (_runtime_of(written),)
        for runtime in runtimes:
            yield _opened(model, runtime, name, there, contents, trees.take(probe, slice(1)), threads)


def _runtime_of(written: Written) -> Runtime:
    """Returns the runtime that a format of another package was read back in."""
    opened = Opened(written.runtime, written.call, OneByOne(written.call))
    return Runtime(written.runtime, "torch", lambda files, example, threads, outputs: opened)


def _opened(
    model: Deployable,
    runtime: Runtime,
    format: str,
    exported: bool,
    contents: Sequence[bytes],
    example: Tree,
    threads: int,
) -> Row:
    row = Row(model=model.name, format=format, runtime=runtime.name, exported=exported, bytes=sum(map(len, contents)))
    try:
        row.opened = runtime.opened(contents, example, threads, model.output_names)
        row.runtime = row.opened.runtime
    except LoweringUnavailable as reason:
        row.left_out = str(reason)
    return row
