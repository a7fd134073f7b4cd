"""Tests the watcher on systems that lack a function, and while it starts."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

import dist_train
from dist_train.config.tree import Config
from dist_train.distributed.watchdog.heartbeat import SIZE, Heartbeat
from dist_train.distributed.watchdog.rank_side import watched
from dist_train.distributed.watchdog.stop_signals import StopRequest
from dist_train.distributed.watchdog.watcher import Watcher
from dist_train.run_dir.paths import RunDir


@pytest.fixture
def config(tmp_path: Path) -> Config:
    file = tmp_path / "watched.yaml"
    file.write_text("run: {name: watched}\ndata: {name: digits}\nmodel: {name: small_resnet}\n")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    return dist_train.load_config(str(file), ["--run.dir", str(run_dir)])


def hears_of_the_file_stop(config: Config, heartbeat: Heartbeat) -> bool:
    RunDir(config.run_dir).stop.touch()
    end = time.monotonic() + 20
    while not heartbeat.stop_reason and time.monotonic() < end:
        time.sleep(0.01)
    return heartbeat.stop_reason == "the file STOP"


def test_a_signal_to_all_processes_of_a_job_does_not_end_a_watcher_that_starts(config: Config) -> None:
    with watched(config, StopRequest()) as heartbeat:
        (watcher,) = [
            child
            for child in psutil.Process().children()
            if "dist_train.distributed.watchdog.watcher" in child.cmdline()
        ]
        watcher.send_signal(signal.SIGTERM)
        watcher.send_signal(signal.SIGUSR2)
        assert hears_of_the_file_stop(config, heartbeat)


@pytest.mark.slow
def test_a_python_without_memfd_create_is_watched_too(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with watched(config, StopRequest()) as heartbeat:
        assert hears_of_the_file_stop(config, heartbeat)


@pytest.fixture
def record() -> int:
    number = os.memfd_create("record")
    os.ftruncate(number, SIZE)
    return number


def watcher_of(pid: int, record: int, run_dir: Path) -> Watcher:
    signals, _ = os.pipe()
    os.set_blocking(signals, False)
    return Watcher(pid, record, record, signals, record, str(run_dir), 30.0, 75)


def test_a_kernel_without_pidfds_is_no_reason_to_watch_nobody(
    record: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int, flags: int = 0) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    nobody = os.getpid()  # not the parent of this process, unlike a rank, which is its watcher's parent
    watcher_of(nobody, record, tmp_path).run()


def test_a_file_system_that_answers_with_an_error_does_not_end_the_watcher(record: int, tmp_path: Path) -> None:
    """A name that is too long raises OSError, as a stale NFS handle does."""
    heartbeat = Heartbeat(memoryview(mmap.mmap(record, SIZE)), 60.0)
    heartbeat.enter("forward")
    threading.Timer(0.1, heartbeat.end).start()
    watcher_of(os.getpid(), record, tmp_path / ("x" * 300)).run()
