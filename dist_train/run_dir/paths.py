"""Names every path of a run directory."""

from __future__ import annotations

import os
import shutil
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
        """Stops the run when somebody creates it."""
        return self.path / "STOP"

    def stopping(self, attempt: int) -> Path:
        """Tells the other ranks, during a long step, that one was asked to stop."""
        return self.logs / f"stopping-{attempt}"

    def stuck(self, attempt: int) -> Path:
        """Holds the watchdog's view of each rank when none made progress."""
        return self.logs / f"stuck-{attempt}"

    def failure(self, attempt: int, rank: int) -> Path:
        """Holds the traceback of a rank's error."""
        return self.logs / f"failure-{attempt}-rank{rank}.txt"

    def asked(self, attempt: int, number: int) -> Path:
        """Holds the ranks' answers to one that waits too long; an attempt's questions are numbered from 0."""
        return self.logs / f".asked-{attempt}-{number}"

    def questions(self, attempt: int) -> list[int]:
        """Lists the numbers of an attempt's questions."""
        names = os.listdir(self.logs) if self.logs.exists() else []
        return [int(name.rpartition("-")[2]) for name in names if name.startswith(f".asked-{attempt}-")]

    @property
    def tensorboard(self) -> Path:
        return self.logs / "tensorboard"

    @property
    def wandb(self) -> Path:
        return self.logs / "wandb"

    def forget(self, attempt: int) -> None:
        """Removes an older attempt's files of the same number, and all questions."""
        for file in (self.stopping(attempt), *self.logs.glob(f"failure-{attempt}-rank*.txt")):
            file.unlink(missing_ok=True)
        for said in (self.stuck(attempt), *self.logs.glob(".asked-*")):
            if said.exists():
                shutil.rmtree(said)

    def details(self, model: str) -> Path:
        """Holds a model's class metrics and worst samples from its final evaluation."""
        return self.report / f"{model}.json"

    def clear(self) -> None:
        """Removes the run's files, and nothing else."""
        for path in (self.checkpoints, self.export, self.ledger, self.report, self.tensorboard, self.wandb):
            if path.exists():
                shutil.rmtree(path)
        for path in (self.environment, self.metrics, self.results, self.config, self.status):
            path.unlink(missing_ok=True)

    def ledger_of(self, rank: int) -> Path:
        return self.ledger / f"rank{rank}.jsonl"


def refuse_foreign(run_dir: RunDir) -> None:
    """Refuses a directory that holds other files, if it has no status.json, with which every attempt begins.

    Even a config.yaml is then the user's own.

    Raises:
        RunDirError: it holds something that no launcher puts there before a run.
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
    """Reads the settings that a run was started with.

    Raises:
        RunDirError: config.yaml is missing or damaged.
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
