"""Runs of strategy fsdp: killed with shards in flight, and gone on with by other ranks, strategies and commands."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch

from dist_train.errors import EXIT_FAILED, EXIT_PREEMPTED
from dist_train.finished_run.open import reopen
from dist_train.models.weights import read_run
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.ledger import check
from dist_train.run_dir.paths import RunDir
from tests.run_dir.test_saves_in_flight_integration import FORMER, HELD, Case
from tests.support.ranks import train, train_done

pytestmark = pytest.mark.slow

SHARDED = ("--strategy", "fsdp")
SYNCS = (9, 2)
"""Calls of fsync in a save: of rank 0, the fourth of them for the other ranks' files; and of rank 1."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run in shards on two ranks."""
    case = Case(tmp_path_factory.mktemp("undisturbed"))
    train_done(2, *case.words(case.run_dir, *SHARDED))
    return case.run_dir


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def held(case: Case, rank: int, sync: int, how: str, *options: str) -> tuple[list[str], dict[str, str]]:
    """Returns the words and variables of a run whose third save is held on a rank, before one of its fsyncs."""
    hold = {"HOLD": f"disk {rank} {2 * SYNCS[rank] + sync} {how}", "HOLD_DIR": str(case.folder)}
    return case.words(case.run_dir, *SHARDED, *options), hold


DRAW = random.Random(17)
MOMENTS = [(rank, DRAW.randrange(SYNCS[rank]), victim) for rank in (0, 1) for victim in (0, 1)]


@pytest.mark.parametrize(("rank", "sync", "victim"), MOMENTS)
def test_killed_with_shards_in_flight_a_run_ends_like_an_undisturbed_one(
    rank: int, sync: int, victim: int, case: Case, undisturbed: RunDir
) -> None:
    words, hold = held(case, rank, sync, "wait")
    with train(2, *words, environ=hold) as ranks:
        assert ranks.until((case.folder / "reached").exists), ranks.printed()
        ranks.kill([victim])
        ranks.wait(90)
        assert "Traceback" not in ranks.printed()
    latest = case.latest()
    assert latest in (FORMER, HELD)
    payload = CheckpointFolder(case.run_dir.checkpoints).load(str(latest))["payload"]
    assert payload["step"] == int(str(latest)[-8:])
    resumed_as(case, undisturbed)


def resumed_as(case: Case, undisturbed: RunDir) -> None:
    train_done(2, *case.words(case.run_dir, *SHARDED))
    names = [CheckpointFolder(each.checkpoints).names() for each in (case.run_dir, undisturbed)]
    assert names[0] == names[1] == ["train-end"]
    files = sorted(each.name for each in (undisturbed.checkpoints / "train-end").glob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        ours, theirs = ((each.checkpoints / "train-end" / file).read_bytes() for each in (case.run_dir, undisturbed))
        assert ours == theirs, file
    assert check(case.run_dir.path).ok
    assert not list(case.run_dir.checkpoints.glob(".*.tmp"))


def test_a_full_disk_of_another_rank_ends_all_ranks_in_words(case: Case, undisturbed: RunDir) -> None:
    words, hold = held(case, 1, 0, "full", "--checkpoint.retry", "0")
    with train(2, *words, environ=hold) as ranks:
        assert ranks.wait() == [EXIT_FAILED] * 2, ranks.printed()
        said = [ranks.output(rank) for rank in (0, 1)]
    message = f"cannot write the checkpoint {case.run_dir.checkpoints / HELD}: [Errno 28] No space left on device"
    assert f"rank 1: {message}" in said[0] and f"dist-train: {message}" in said[1], said
    assert not any("Traceback" in each for each in said)
    assert case.latest() == FORMER
    resumed_as(case, undisturbed)


def stopped(case: Case, world_size: int, forwards: int, *options: str) -> None:
    """Runs until rank 0's n-th forward of training, and asks it to stop there."""
    for file in ("reached", "go"):
        (case.folder / file).unlink(missing_ok=True)
    hold = {"HOLD": f"forward 0 {forwards} wait", "HOLD_DIR": str(case.folder)}
    with train(world_size, *case.words(case.run_dir, *options), environ=hold) as ranks:
        assert ranks.until((case.folder / "reached").exists), ranks.printed()
        os.kill(ranks.processes[0].pid, signal.SIGTERM)  # a file STOP is seen some steps later
        case.go()
        assert ranks.wait() == [EXIT_PREEMPTED] * world_size, ranks.printed()


def test_other_ranks_and_strategies_go_on_and_one_process_reads_the_run(case: Case) -> None:
    (case.folder / "alone").mkdir()
    alone = Case(case.folder / "alone")
    train_done(1, *alone.words(alone.run_dir))
    stopped(case, 2, 4, *SHARDED)
    first = case.latest()
    assert (case.run_dir.checkpoints / str(first) / "shards-rank1.safetensors").exists()
    assert len(read_run(case.run_dir.path)) == 4, "model.init_from reads it whole"
    stopped(case, 3, 4, *SHARDED)
    second = case.latest()
    assert str(second) > str(first) and (case.run_dir.checkpoints / str(second) / "shards-rank2.safetensors").exists()
    stopped(case, 2, 4, "--strategy", "ddp")
    assert [each.name for each in (case.run_dir.checkpoints / str(case.latest())).glob("shards-*")] == []
    train_done(3, *case.words(case.run_dir, *SHARDED))
    assert check(case.run_dir.path).ok
    models = [reopen(each.run_dir.path).product("train")["model"] for each in (case, alone)]
    torch.testing.assert_close(*models, rtol=1e-5, atol=1e-6)
    code = ("--import", "tests.support.blocking_parts")
    assert "31" in train_done(1, "evaluate", str(case.run_dir.path), *code)
    train_done(1, "export", str(case.run_dir.path), "--model", "fp32", *code)
    assert (case.run_dir.export / "manifest.json").exists()
