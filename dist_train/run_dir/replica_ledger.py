"""The ledger of replicas that come and go: each announces its samples of a step, and those who commit it say so.

A step may be tried several times, by other replicas each time. The trial that counts is the one that some replica
committed. All that were announced for it have gone into its sums, also those of a replica that was killed before it
could commit, or had to take the step from another. After all replicas were lost, steps are committed again: then the
last trial counts, by the clock.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dist_train.run_dir.files import LineFile
from dist_train.run_dir.paths import RunDir

Line = dict[str, Any]


class ReplicaLedger:
    """Writes one replica's lines."""

    def __init__(self, run_dir: RunDir, attempt: int) -> None:
        self._file = LineFile(run_dir.ledger_of(0))
        self._attempt = attempt
        self._trial = ""

    def announce(
        self, stage: str, epoch: int, step: int, ids: list[int], left_out: Sequence[int], ranks: int, trial: str
    ) -> None:
        """Adds this replica's share of a trial of a step, before its gradients leave; the line survives a kill.

        ids: read from the dataset together with the tensors that enter forward.
        """
        line = {"attempt": self._attempt, "world_size": ranks, "stage": stage, "epoch": epoch, "step": step}
        line |= {"ids": ids, "trial": trial}
        self._file.append({**line, "left_out": list(left_out)} if left_out else line)
        self._file.flush()
        self._trial = trial

    def record(
        self, stage: str, epoch: int, step: int, ids: list[int], skipped: bool, left_out: Sequence[int] = ()
    ) -> None:
        """Adds that the trial announced last was committed; this line, too, survives a kill."""
        line = {"stage": stage, "step": step, "trial": self._trial, "committed": time.time(), "skipped": skipped}
        self._file.append(line)
        self._file.flush()

    def sync(self) -> None:
        """Writes the lines to the disk; called before the checkpoint that covers them commits."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def of_committed(files: Iterable[Iterable[Line]]) -> dict[tuple[str, int], list[Line]]:
    """Returns (stage, step) -> the lines of the trial that counts, one per replica, as a run of ranks would have them.

    files: the lines of each replica.
    """
    shares: dict[tuple[str, int, str], list[Line]] = defaultdict(list)
    commits: dict[tuple[str, int], dict[str, Line]] = defaultdict(dict)
    for lines in files:
        own: dict[tuple[str, int, str], Line] = {}
        for line in lines:
            if "committed" in line:
                commits[line["stage"], line["step"]][line["trial"]] = line
            else:
                own[line["stage"], line["step"], line["trial"]] = line
        for key, line in own.items():
            shares[key].append(line)
    found = {}
    for place, trials in commits.items():
        last = max(trials.values(), key=lambda line: float(line["committed"]))
        counted = shares[place[0], place[1], last["trial"]]
        found[place] = [{**line, "skipped": last["skipped"]} for line in counted]
    return found


def is_commit(entry: Any) -> bool:
    """Tells whether a value that was read from a ledger says that a trial was committed."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("stage"), str)
        and type(entry.get("step")) is int
        and isinstance(entry.get("trial"), str)
        and isinstance(entry.get("committed"), float)
        and isinstance(entry.get("skipped"), bool)
    )


def ledgers_of(folder: Path) -> list[Path]:
    """Lists the ledgers of the replicas whose common folder this is."""
    found = (path for path in folder.glob("replica-*/ledger") if path.is_dir())
    # A fast development run beside them has a longer name.
    return sorted(path for path in found if path.parent.name.removeprefix("replica-").isdecimal())
