"""Checkpoints of a stage that are written beside the loop."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from dist_train.config.tree import Config
from dist_train.distributed.world import World
from dist_train.errors import CheckpointError
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.ledger import NoLedger
from dist_train.stages.checkpoints import StageCheckpoints
from dist_train.trackers.base import Trackers


class Disk:
    """The fsync of the thread that writes checkpoints: held until `go`, or full."""

    def __init__(self) -> None:
        self.reached, self.go, self.full = Event(), Event(), False
        self.go.set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made, fsync = Disk(), os.fsync

    def held(descriptor: int) -> None:
        if threading.current_thread().name == "checkpoint":
            made.reached.set()
            assert made.go.wait(20)
            if made.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", held)
    yield made
    made.go.set()


class Case:
    def __init__(self, path: Path, **settings: Any) -> None:
        self.world, self.folder = World(), CheckpointFolder(path)
        config = Config.model_validate(
            {"data": {"name": "fake"}, "model": {"name": "mlp"}, "checkpoint": {"retry": 0, **settings}}
        )
        self.checkpoints = StageCheckpoints(self.folder, config, self.world, NoLedger(), Trackers([]), dict)
        self.weight = torch.zeros(100)

    def save(self, step: int, *best: int, needed: int | None = None) -> None:
        self.weight.fill_(step)
        state = {"step": step, "epoch_open": False, "weight": self.weight}
        self.checkpoints.save_step("train", step, state, best, needed)

    def saved(self, step: int) -> float:
        return float(self.checkpoints.load_step("train", step)["weight"].mean())


def test_the_loop_goes_on_and_the_checkpoint_holds_the_moment_of_its_save(disk: Disk, tmp_path: Path) -> None:
    case = Case(tmp_path)
    disk.go.clear()
    case.save(1)
    assert disk.reached.wait(20) and case.folder.latest is None
    case.weight.fill_(7)  # the next steps
    disk.go.set()
    assert case.saved(1) == 1.0 and case.folder.latest == "train-00000001"


def test_without_it_a_save_is_on_the_disk_when_it_returns(disk: Disk, tmp_path: Path) -> None:
    case = Case(tmp_path, asynchronous=False)
    disk.go.clear()
    case.save(1)
    assert case.folder.latest == "train-00000001" and not disk.reached.is_set()
    assert not len(case.checkpoints._buffer._memory), "no copy was made"


def test_what_is_kept_is_the_same_with_saves_in_flight(disk: Disk, tmp_path: Path) -> None:
    kept = []
    for asynchronous in (True, False):
        case = Case(tmp_path / str(asynchronous), asynchronous=asynchronous, keep={"last": 2, "best": 1})
        names = []
        for step in range(1, 8):
            case.save(step, 2, needed=2 if step >= 2 else None)
            case.checkpoints.settle()
            names.append(case.folder.names())
        case.checkpoints.save_stage("train", {"weight": case.weight})
        record = case.folder.load("train-00000007")["retention"]
        record.pop("since")
        kept.append((names, case.folder.names(), record))
    assert kept[0] == kept[1]
    assert kept[0][0][-1] == ["train-00000002", "train-00000006", "train-00000007"]


def test_the_older_one_lives_until_the_new_one_is_whole(disk: Disk, tmp_path: Path) -> None:
    case = Case(tmp_path, keep={"last": 1, "best": 0})
    case.save(1)
    case.checkpoints.settle()
    disk.reached.clear()
    disk.go.clear()
    case.save(2)
    assert disk.reached.wait(20)
    assert case.folder.names() == ["train-00000001"] and case.folder.latest == "train-00000001"
    disk.go.set()
    case.checkpoints.settle()
    assert case.folder.names() == ["train-00000002"]


def test_an_error_asks_for_a_stop_and_is_raised_by_whatever_waits(disk: Disk, tmp_path: Path) -> None:
    for number, wait in enumerate(("settle", "load_step", "save_stage")):
        case = Case(tmp_path / str(number))
        case.save(1)
        case.checkpoints.settle()
        disk.full = True
        assert not case.world.stop_wanted()
        case.save(2)
        case.save(3)  # waits for the former, and saves nothing
        assert case.world.stop_wanted()
        arguments = {"settle": (), "load_step": ("train", 1), "save_stage": ("train", {})}[wait]
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*train-00000002.*No space left"):
            getattr(case.checkpoints, wait)(*arguments)
        disk.full = False
        assert case.folder.latest == "train-00000001" and case.folder.names() == ["train-00000001"]


def test_a_state_that_cannot_be_held_is_an_error_of_the_save(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.checkpoints.save_step("train", 1, {"epoch_open": False, "odd": {1, 2}}, (), None)
    assert case.world.stop_wanted()
    with pytest.raises(CheckpointError, match="odd is a builtins.set"):
        case.checkpoints.settle()


def test_a_run_that_fails_finishes_the_save_and_says_if_it_cannot(disk: Disk, tmp_path: Path) -> None:
    said: list[str] = []
    case = Case(tmp_path)
    case.save(1)
    case.checkpoints.close(said.append)
    assert case.folder.latest == "train-00000001" and not said
    disk.full = True
    case.save(2)
    case.checkpoints.close(said.append)
    assert len(said) == 1 and "the checkpoint train-00000002 is not saved" in said[0] and "No space left" in said[0]
    case.checkpoints.close(said.append)
    assert len(said) == 1


def test_a_stage_that_ends_leaves_no_copy_in_memory(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.save(1)
    assert len(case.checkpoints._buffer._memory)
    case.checkpoints.save_stage("train", {"weight": case.weight})
    assert not len(case.checkpoints._buffer._memory)
