"""Every path of a run, named once, and the ways in which its files are written."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_train.errors import RunDirError


@dataclass(frozen=True)
class RunDir:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def profile_of(self, stage: str) -> Path:
        return self.path / "logs" / f"profile-{stage}.json.gz"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def stop(self) -> Path:
        """A file that somebody puts here to stop the run."""
        return self.path / "STOP"

    def stopping(self, attempt: int) -> Path:
        """A rank that was asked to stop tells the others so, where a step is long."""
        return self.logs / f"stopping-{attempt}"

    def stuck(self, attempt: int) -> Path:
        """What the watchdog saw of each rank when none went on."""
        return self.logs / f"stuck-{attempt}"

    def asked(self, attempt: int, number: int) -> Path:
        """What ranks say of themselves, asked by one that waits too long; the attempt's questions are numbered from 0."""
        return self.logs / f".asked-{attempt}-{number}"

    def questions(self, attempt: int) -> list[int]:
        """The numbers of those that are there."""
        names = os.listdir(self.logs) if self.logs.exists() else []
        return [int(name.rpartition("-")[2]) for name in names if name.startswith(f".asked-{attempt}-")]

    @property
    def tensorboard(self) -> Path:
        return self.logs / "tensorboard"

    @property
    def wandb(self) -> Path:
        return self.logs / "wandb"

    def forget(self, attempt: int) -> None:
        """Removes what an attempt of the same number said, before the counting began anew here, and questions of any."""
        self.stopping(attempt).unlink(missing_ok=True)
        for said in (self.stuck(attempt), *self.logs.glob(".asked-*")):
            if said.exists():
                shutil.rmtree(said)

    def details(self, model: str) -> Path:
        """What the final evaluation of a model showed besides its scalars."""
        return self.report / f"{model}.json"

    def clear(self) -> None:
        """Removes what a run left here, and nothing else."""
        for path in (self.checkpoints, self.export, self.ledger, self.report, self.tensorboard, self.wandb):
            if path.exists():
                shutil.rmtree(path)
        for path in (self.environment, self.metrics, self.results, self.config, self.status):
            path.unlink(missing_ok=True)

    def ledger_of(self, rank: int) -> Path:
        return self.ledger / f"rank{rank}.jsonl"


def replace_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all: beside it, to the disk, renamed."""
    # Two ranks may write one file (status.json, at a failure), on two nodes even with one process id.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def replace_json(path: Path, value: Any) -> None:
    replace_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`, or None where there is no such file.

    Raises:
        RunDirError: it is not JSON. We replace such files whole, so something else damaged it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunDirError(f"{path} is damaged: {error}", "restore it, or start anew with another --run.dir") from error


def refuse_foreign(run_dir: RunDir) -> None:
    """For a directory without status.json, which every attempt begins by writing: even a config.yaml is then the user's own.

    Raises:
        RunDirError: it holds something that a launcher does not put there before a run.
    """
    before_a_run = ("logs", "STOP")
    if run_dir.path.is_dir() and any(
        entry.name not in before_a_run and not entry.name.startswith(".") for entry in run_dir.path.iterdir()
    ):
        raise RunDirError(
            f"{run_dir.path} is not empty, and is not a run directory",
            "--run.dir DIR, with a new or an empty folder",
        )


def recorded_config(run_dir: RunDir) -> dict[str, Any]:
    """The settings that a run was started with.

    Raises:
        RunDirError: they are missing or damaged.
    """
    try:
        recorded = yaml.safe_load(run_dir.config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunDirError(
            f"{run_dir.path} is not a run directory: it has no {run_dir.config.name}", "name one, runs/NAME"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunDirError(
            f"{run_dir.config} cannot be read: {error}", "restore it, or start anew with another --run.dir"
        ) from error
    if not isinstance(recorded, dict) or not isinstance(recorded.get("stages"), list):
        raise RunDirError(
            f"{run_dir.config} is damaged: it does not list the stages",
            "restore it, or start anew with another --run.dir",
        )
    return recorded


def sync_directory(path: Path) -> None:
    """Makes the renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LineFile:
    """An append-only file of JSON lines that survives kills: a line that a kill tore is cut off when the file is opened again."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 65536)
            self._file.seek(start)
            newline = self._file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            self._file.truncate(position)
        self._file.seek(0, os.SEEK_END)

    def append(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")

    def flush(self) -> None:
        """Hands the lines to the system: they outlive the process, not the machine."""
        self._file.flush()

    def sync(self) -> None:
        """Puts the lines on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()
