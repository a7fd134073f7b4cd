"""Names every path of a run directory."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from dist_train.errors import RunDirError
from dist_train.run_dir import saved
from dist_train.run_dir.leftovers import remove_leftovers

BEFORE_A_RUN = ("logs", "STOP")
"""Names in a run directory that a launcher or a user may put there before the run begins."""


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
    def data_files(self) -> Path:
        """Holds times and hashes of the files of a dataset that is made of files."""
        return self.path / "data-files.safetensors"

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

    @property
    def benchmark(self) -> Path:
        return self.path / "benchmark"

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

    def leaving(self, attempt: int) -> Path:
        """Tells the other ranks, during a long step, that a node was told to leave."""
        return self.logs / f"leaving-{attempt}"

    def agent_mark(self, name: str) -> Path:
        """Tells ranks that an agent starts again that they may go on; see `run_dir.agents`."""
        return self.logs / f".agent-{name}"

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
        """Removes an older attempt's files of the same number, all questions, and all marks of agents."""
        self.forget_agents()
        failures = self.logs.glob(f"failure-{attempt}-rank*.txt")
        for file in (self.stopping(attempt), self.leaving(attempt), *failures):
            file.unlink(missing_ok=True)
        for said in (self.stuck(attempt), *self.logs.glob(".asked-*")):
            if said.exists():
                shutil.rmtree(said)

    def forget_agents(self) -> None:
        for mark in self.logs.glob(".agent-*"):
            mark.unlink(missing_ok=True)

    def details(self, model: str) -> Path:
        """Holds a model's class metrics and worst samples from its final evaluation."""
        return self.report / f"{model}.json"

    def remove_leftovers(self) -> None:
        """Removes temporary files whose writer was killed."""
        places = (self.path, self.checkpoints, self.ledger, self.report, self.logs)
        remove_leftovers(*places, *self.logs.glob("*/"))

    def clear(self) -> None:
        """Removes the run's files, and nothing else."""
        folders = (
            self.checkpoints,
            self.export,
            self.ledger,
            self.report,
            self.tensorboard,
            self.wandb,
            self.benchmark,
        )
        for path in folders:
            if path.exists():
                shutil.rmtree(path)
        for path in (self.environment, self.data_files, self.metrics, self.results, self.config, self.status):
            path.unlink(missing_ok=True)

    def ledger_of(self, rank: int) -> Path:
        return self.ledger / f"rank{rank}.jsonl"


def refuse_folders(run_dir: RunDir) -> None:
    """Refuses a directory in which a folder has the name of one of the run's files.

    Raises:
        RunDirError: it names the folder.
    """
    files = (run_dir.config, run_dir.status, run_dir.environment, run_dir.results, run_dir.metrics, run_dir.stop)
    for file in (*files, run_dir.checkpoints / saved.LATEST):
        if file.is_dir():
            raise RunDirError(f"{file} is a folder, where a file of the run belongs", f"rmdir {file}, or move it away")


def refuse_foreign(run_dir: RunDir) -> None:
    """Refuses a directory that holds other files, if it has neither checkpoints nor a status.json.

    Every attempt begins with a status.json, so that even a config.yaml is then the user's own.

    Raises:
        RunDirError: it holds something that no launcher puts there before a run.
        CheckpointError: of its checkpoints only a latest.json is left.
    """
    if run_dir.status.exists() or saved.newest(run_dir.checkpoints) is not None:
        return
    if run_dir.path.is_dir() and any(
        entry.name not in BEFORE_A_RUN and not entry.name.startswith(".") for entry in run_dir.path.iterdir()
    ):
        raise RunDirError(
            f"{run_dir.path} is not empty, and is not a run directory",
            "--run.dir DIR, with a new or an empty folder",
        )
