"""The ledger of replicas: what was announced for a committed trial counts, whoever was lost after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.errors import RunDirError
from dist_train.run_dir.ledger import check, read_steps, record_expectation
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.replica_ledger import ReplicaLedger

BATCHES = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


class Replica:
    def __init__(self, folder: Path, number: int) -> None:
        run_dir = RunDir(folder / f"replica-{number}")
        record_expectation(run_dir, 10, 10)
        self._ledger = ReplicaLedger(run_dir, 0)

    def tries(self, step: int, trial: str, rank: int, ranks: int, commits: bool = True) -> None:
        batch = BATCHES[step]
        ids = batch[len(batch) * rank // ranks : len(batch) * (rank + 1) // ranks]
        self._ledger.announce("train", 0, step, ids, (), ranks, trial)
        if commits:
            self._ledger.record("train", 0, step, ids, False)


def test_three_become_two_and_three_again(tmp_path: Path) -> None:
    first, second, third = (Replica(tmp_path, number) for number in range(3))
    for rank, each in enumerate((first, second, third)):
        each.tries(0, "a-0", rank, 3)
        each.tries(1, "a-1", rank, 3, commits=False)
    for rank, each in enumerate((first, second)):
        each.tries(1, "b-1", rank, 2)
    for rank, each in enumerate((first, second, third)):
        each.tries(2, "c-2", rank, 3)
    report = check(tmp_path)
    assert report.ok and report.epochs == {("train", 0): 10}, report
    assert [len(lines) for lines in read_steps(tmp_path).values()] == [3, 2, 3]


def test_the_share_of_one_that_was_killed_before_it_could_commit_counts(tmp_path: Path) -> None:
    first, second = Replica(tmp_path, 0), Replica(tmp_path, 1)
    first.tries(0, "a-0", 0, 2)
    second.tries(0, "a-0", 1, 2, commits=False)
    for step in (1, 2):
        first.tries(step, f"b-{step}", 0, 1)
    assert check(tmp_path).ok


def test_a_step_that_all_commit_anew_counts_once(tmp_path: Path) -> None:
    first, second = Replica(tmp_path, 0), Replica(tmp_path, 1)
    for step in range(3):
        first.tries(step, f"a-{step}", 0, 2)
        second.tries(step, f"a-{step}", 1, 2)
    for step in range(1, 3):
        second.tries(step, f"b-{step}", 0, 1)
    assert check(tmp_path).ok
    assert [len(lines) for lines in read_steps(tmp_path).values()] == [2, 1, 1]


def test_a_share_that_nobody_announced_is_a_problem(tmp_path: Path) -> None:
    first = Replica(tmp_path, 0)
    for step in range(3):
        first.tries(step, f"a-{step}", 0, 2 if step == 1 else 1)
    report = check(tmp_path)
    assert "train step 1: 1 of 2 ranks have a line" in report.problems


def test_a_fast_development_run_beside_them_is_none_of_them(tmp_path: Path) -> None:
    first = Replica(tmp_path, 0)
    for step in range(3):
        first.tries(step, f"a-{step}", 0, 1)
    (tmp_path / "replica-0").rename(tmp_path / "replica-0-fast-dev-run")
    with pytest.raises(RunDirError, match="has no ledger"):
        check(tmp_path)


def test_the_ledger_of_one_replica_is_not_taken_for_that_of_all(tmp_path: Path) -> None:
    Replica(tmp_path, 0).tries(0, "a-0", 0, 2)
    with pytest.raises(RunDirError, match="is one replica of a run") as error:
        check(tmp_path / "replica-0")
    assert f"dist-train ledger {tmp_path}" in str(error.value.hint)
