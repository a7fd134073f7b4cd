"""Reads runs for a report from their directories, finished or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dist_train.errors import RunDirError, escaped, printable
from dist_train.report.schema import ConfigFile, Details, Environment, Line, Results, Status, checked
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.record import recorded_config
from dist_train.untrusted import parse_json

_NO_SCALARS = ("time", "stage", "epoch", "step", "attempt")


@dataclass(frozen=True)
class Point:
    """A scalar at an optimizer step of a stage; `value` is None where it was not finite."""

    stage: str
    epoch: int
    step: int
    attempt: int
    name: str
    value: float | None


@dataclass(frozen=True)
class RunRecord:
    """A run, as read from its directory.

    Attributes:
        label: the run's name, or its path where several runs have that name.
        details: by model: class metrics and the worst samples of its final evaluation.
    """

    path: Path
    label: str
    config: dict[str, Any]
    status: dict[str, Any]
    environment: dict[str, Any]
    results: dict[str, Any]
    points: list[Point]
    details: dict[str, dict[str, Any]]

    @property
    def state(self) -> str:
        return str(self.status.get("state", "unknown"))

    @property
    def stages(self) -> list[str]:
        """Stages with curves, in the order of their first line."""
        return list(dict.fromkeys(point.stage for point in self.points))

    def curve(self, stage: str, name: str) -> list[Point]:
        return [point for point in self.points if (point.stage, point.name) == (stage, name)]


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Reads runs that are finished, running or failed.

    Raises:
        RunDirError: a directory holds no run, or one of its files is damaged.
    """
    configs = [checked(_printable(recorded_config(RunDir(path))), ConfigFile, RunDir(path).config) for path in paths]
    names = [str((config.get("run") or {}).get("name", path)) for config, path in zip(configs, paths, strict=True)]
    return [
        _read(RunDir(path), name if names.count(name) == 1 else str(path), config)
        for path, name, config in zip(paths, names, configs, strict=True)
    ]


def _read(run_dir: RunDir, label: str, config: dict[str, Any]) -> RunRecord:
    found = {path.stem: _printable_json(path) for path in sorted(run_dir.report.glob("[!.]*.json"))}
    # A user may keep other JSON files there.
    details = {
        name: checked(each, Details, run_dir.details(name))
        for name, each in found.items()
        if isinstance(each, dict) and {"metrics", "worst"} <= set(each)
    }
    results = _fields(read_json(run_dir.results), Results, run_dir.results)
    order = dict.fromkeys([*results.get("models", {}), *details])
    return RunRecord(
        path=run_dir.path,
        label=escaped(label),
        config=_printable(config),
        status=_fields(read_json(run_dir.status), Status, run_dir.status),
        environment=_fields(read_json(run_dir.environment), Environment, run_dir.environment),
        results=results,
        points=join_attempts(read_points(run_dir.metrics)),
        details={name: details[name] for name in order if name in details},
    )


def _fields(value: Any, model: type[BaseModel], path: Path) -> dict[str, Any]:
    """Checks a JSON object by its schema; {} where there is none."""
    return {} if value is None else dict(checked(_printable(value), model, path))


def _printable_json(path: Path) -> Any:
    """Reads JSON, with names that are no UTF-8 escaped, as neither a page nor a plot takes them."""
    return _printable(read_json(path))


def _printable(value: Any) -> Any:
    if isinstance(value, dict):
        return {_printable(key): _printable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_printable(each) for each in value]
    return printable(value) if isinstance(value, str) else value


def read_points(path: Path) -> list[Point]:
    """Reads the scalars of metrics.jsonl, in order; drops a last line that is still being written.

    Raises:
        RunDirError: another line is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [point for number, line in enumerate(lines, start=1) for point in _points(line, f"{path}, line {number}")]


def _points(line: str, where: str) -> Iterator[Point]:
    try:
        entry = checked(parse_json(line), Line, where)
        for name, value in entry.items():
            if name not in _NO_SCALARS:
                number = None if value is None else float(value)
                yield Point(entry["stage"], entry["epoch"], entry["step"], entry["attempt"], name, number)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirError(f"{where} is damaged: {error}", "remove the line") from error


def join_attempts(points: Sequence[Point]) -> list[Point]:
    """Joins attempts into one curve: the points of steps that a later attempt repeated are dropped."""
    done: dict[tuple[str, int], tuple[int, int]] = {}
    for point in points:
        first, last = done.get((point.stage, point.attempt), (point.step, point.step))
        done[point.stage, point.attempt] = (min(first, point.step), max(last, point.step))
    kept = {
        (point.stage, point.step, point.name): point
        for point in sorted(points, key=lambda point: point.attempt)
        if not any(
            stage == point.stage and attempt > point.attempt and first <= point.step <= last
            for (stage, attempt), (first, last) in done.items()
        )
    }
    order = list(dict.fromkeys(point.stage for point in points))
    return sorted(kept.values(), key=lambda point: (order.index(point.stage), point.step))
