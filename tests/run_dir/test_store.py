"""A store that takes requests and never answers them, and errors that are of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Timer

import pytest

from dist_train.artifact.fetch import fetch_artifact
from dist_train.errors import RunDirError, StoreError
from dist_train.run_dir import store as store_module
from dist_train.run_dir.lease import this_process
from dist_train.run_dir.working_copy import WorkingCopy
from tests.support.s3_server import S3, _s3_of_module, s3

__all__ = ["_s3_of_module", "s3"]
pytestmark = [pytest.mark.heavy, pytest.mark.timeout(60)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only where there is /dev/full")
def test_a_full_disk_is_no_fault_of_the_store(s3: S3, tmp_path: Path) -> None:
    s3.store("any").write("x", b"x" * 10_000_000)
    with pytest.raises(OSError, match="No space left on device"):
        s3.store("any").download("x", Path("/dev/full"))


def test_an_artifact_that_has_no_place_here_is_told_without_a_traceback(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.store("artifact").write("manifest.json", b"{}")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RunDirError, match="cannot be used") as refused:
        fetch_artifact(s3.address("artifact"))
    assert "XDG_CACHE_HOME=FOLDER" in (refused.value.hint or "")


@pytest.fixture
def silent(s3: S3) -> Iterator[S3]:
    s3.store("any").write("x", b"x")
    s3.way.silent = True
    yield s3
    s3.way.let()


def test_what_is_never_answered_is_given_up(silent: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store_module, "_SILENT_SECONDS", 0.5)
    with pytest.raises(StoreError, match="s3://bucket/any could not be listed: no answer in"):
        silent.store("any").sizes()


def test_after_its_end_nothing_waits_for_a_store(silent: S3, tmp_path: Path) -> None:
    store = silent.store("any")
    store.ends = time.monotonic() + 0.5
    (tmp_path / "file").write_bytes(b"x" * 1000)
    with pytest.raises(StoreError, match="could not be given file: no answer in"):
        store.upload(tmp_path / "file", "file")
    with pytest.raises(StoreError, match="no answer in 0 s"):
        store.read("x")


def test_a_push_that_waits_for_an_answer_is_left_when_the_run_is_asked_to_stop(
    s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = WorkingCopy(s3.address("stopping"), tmp_path / "copy", this_process(0))
    (tmp_path / "copy" / "status.json").write_text("{}")
    s3.way.silent = True
    stop = Event()
    Timer(0.5, stop.set).start()
    copy.publish(interrupted=stop.is_set)
    assert "warning" not in capsys.readouterr().err  # the end of the run sends it, or says why not
    s3.way.let()
    copy.finish(0.0)
    copy.close()
    assert set(s3.store("stopping").sizes()) == {"status.json", ".pushed.json"}
