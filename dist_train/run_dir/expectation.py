"""Writes and reads what a ledger is to show: how many samples an epoch has, which, and how they were drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.errors import RunDirError
from dist_train.run_dir.files import replace_file, replace_json
from dist_train.run_dir.paths import RunDir


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A draw of rows by weight, as the sampler made it.

    Attributes:
        weights: float64 [rows].
        seed: of the run.
        replacement, samples: of `data.sampling`.
        steps_per_epoch: global batches of an epoch.
    """

    weights: np.ndarray
    seed: int
    replacement: bool
    samples: int | None
    global_batch_size: int
    drop_last: bool
    steps_per_epoch: int


@dataclass(frozen=True)
class Expectation:
    """Further facts that a ledger is to show, beside the number of samples.

    Attributes:
        ids: int64 [rows], of the training rows; None: 0 .. rows - 1.
        draw: the draw by weight; None: each row comes once an epoch.
        first: stage -> the step at which it began in this run, and the samples of that epoch that were consumed
            before; of stages that did not begin at 0.
    """

    ids: np.ndarray | None = None
    draw: Draw | None = None
    first: dict[str, dict[str, int]] = field(default_factory=dict)


IDS, WEIGHTS = "ids.npy", "weights.npy"  # beside expected.json
_NOTHING_ELSE = Expectation()


def record_expectation(run_dir: RunDir, train_samples: int, per_epoch: int, more: Expectation = _NOTHING_ELSE) -> None:
    """Writes the number of samples, and the number that an epoch must consume; called by rank 0."""
    run_dir.ledger.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"train_samples": train_samples, "per_epoch": per_epoch}
    if more.ids is not None:
        found["ids_sha256"] = _write_array(run_dir.ledger / IDS, more.ids)
    if more.draw is not None:
        settings = {name.name: getattr(more.draw, name.name) for name in fields(more.draw) if name.name != "weights"}
        found["draw"] = {**settings, "weights_sha256": _write_array(run_dir.ledger / WEIGHTS, more.draw.weights)}
    if more.first:
        found["first"] = more.first
    replace_json(run_dir.ledger / "expected.json", found)


def _write_array(path: Path, array: np.ndarray) -> str:
    """Writes an array and returns the SHA-256 of its elements."""
    with replace_file(path) as file:
        np.save(file, array)
    return hashlib.sha256(array.tobytes()).hexdigest()


def _read_array(path: Path, sha256: str) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
        if hashlib.sha256(array.tobytes()).hexdigest() == sha256:
            return array
        reason = "its content is another"
    except (OSError, ValueError, EOFError) as error:
        reason = str(error)
    raise RunDirError(f"{path} is damaged: {reason}", "start the run again: rank 0 writes it anew; or restore the file")


def expected(recorded: Any, folder: Path) -> tuple[int, int, Expectation]:
    """Returns what `record_expectation` was given.

    Raises:
        RunDirError: a file is damaged.
    """
    damaged = RunDirError(
        f"{folder / 'expected.json'} is damaged",
        "start the run again: rank 0 writes it anew; or restore the file",
    )
    if not isinstance(recorded, dict) or not are_ints(recorded.get(name) for name in ("train_samples", "per_epoch")):
        raise damaged
    try:
        ids = draw = None
        if "ids_sha256" in recorded:
            ids = _read_array(folder / IDS, recorded["ids_sha256"])
        if "draw" in recorded:
            settings = dict(recorded["draw"])
            draw = Draw(weights=_read_array(folder / WEIGHTS, settings.pop("weights_sha256")), **settings)
        first = recorded.get("first", {})
        if not all(are_ints((each["step"], each["consumed"])) for each in first.values()):
            raise damaged
    except (TypeError, KeyError, AttributeError, ValueError):
        raise damaged from None
    return recorded["train_samples"], recorded["per_epoch"], Expectation(ids, draw, first)


def are_ints(values: Iterable[Any]) -> bool:
    """Tells whether values that were read from a file are integers, and no bools."""
    return all(type(value) is int for value in values)
