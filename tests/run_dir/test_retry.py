from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dist_train.errors import CheckpointError
from dist_train.run_dir import files, retry
from dist_train.run_dir.files import LineFile, replace_json
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.retry import is_momentary, retried, told
from dist_train.trackers.jsonl import JsonLines
from dist_train.trackers.status import Status

FULL = OSError(errno.ENOSPC, "No space left on device")
MOMENTARY = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT]
LASTING = [errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_warned", set())
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.001)


def failing(times: int, error: BaseException) -> Callable[[], str]:
    left: Iterator[int] = iter(range(times))

    def write() -> str:
        if next(left, None) is not None:
            raise error
        return "written"

    return write


@pytest.mark.parametrize("number", MOMENTARY)
def test_what_may_pass_is_tried_again(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    beats = list[None]()
    error = OSError(number, os.strerror(number))
    assert retried(failing(5, error), 60, "the file x", lambda: beats.append(None)) == "written"
    said = capsys.readouterr().err.splitlines()
    assert len(beats) == 6 and len(said) == 2, "a line when it begins, and one when it is over"
    assert said[0].startswith("dist-train: warning: the file x: ") and os.strerror(number) in said[0]


def test_our_errors_count_by_their_cause() -> None:
    ours = CheckpointError("cannot write", "make room")
    ours.__cause__ = FULL
    assert is_momentary(ours) and retried(failing(2, ours), 60, "x") == "written"
    assert not is_momentary(CheckpointError("damaged"))


@pytest.mark.parametrize("number", LASTING)
def test_what_does_not_pass_is_raised_at_once(number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)):
        retried(failing(1, OSError(number, os.strerror(number))), 3600, "x")


def test_after_its_time_the_last_error_is_raised() -> None:
    with pytest.raises(OSError, match="No space left"):
        retried(failing(10**9, FULL), 0.05, "x")


def test_a_file_that_only_tells_is_given_up_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        assert not told(failing(1, FULL), tmp_path / "status.json")
    assert told(failing(0, FULL), tmp_path / "status.json")
    said = capsys.readouterr().err
    assert said.count("is not up to date, and the run goes on") == 1 and "No space left on device" in said


def test_the_status_goes_on_while_a_disk_is_full_and_ends_when_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = Status(RunDir(tmp_path), "run", 0, retry=60)
    full = [True, True, True]
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if full and full.pop():
            raise FULL
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    status.set(stage="train")
    assert not RunDir(tmp_path).status.exists()
    status.end("done")
    assert json.loads(RunDir(tmp_path).status.read_text())["state"] == "done"
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_lines_wait_for_a_disk_that_is_full_and_none_is_lost_or_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full takes no byte, as a full disk; half a line is what a disk takes that becomes full."""
    path = tmp_path / "metrics.jsonl"
    lines = LineFile(path)
    lines.append({"step": 0})
    lines.flush()
    good = lines._file
    half = len(b'{"step":1}\n') // 2
    assert good.write(b'{"step":1}\n'[:half]) == half
    with open("/dev/full", "wb", buffering=0) as full:
        lines._file = full  # type: ignore[assignment]
        lines.append({"step": 1})
        del lines._pending[:half]
        for step in range(2, 5):
            lines.append({"step": step})
            with pytest.raises(OSError, match="No space left"):
                lines.flush()
        lines._file = good
    lines.append({"step": 5})
    lines.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(6))


def test_the_tracker_of_metrics_is_patient_but_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = JsonLines(RunDir(tmp_path), "run", 0)
    good = tracker._file._file
    with open("/dev/full", "wb", buffering=0) as full:
        tracker._file._file = full  # type: ignore[assignment]
        tracker.log("train", 0, 0, {"loss": 1.0})
        tracker.sync()
        monkeypatch.setattr("dist_train.trackers.jsonl._PATIENCE_SECONDS", 0.0)
        with pytest.raises(OSError, match="No space left"):
            tracker.log("train", 0, 1, {"loss": 0.5})
    tracker._file._file = good
    tracker.close()
    assert [json.loads(line)["step"] for line in RunDir(tmp_path).metrics.read_text().splitlines()] == [0, 1]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_a_file_system_that_cannot_flush_folders_is_used_with_a_warning(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    path = tmp_path / "a.json"
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            replace_json(path, 1)
        return
    replace_json(path, 1)
    replace_json(path, 2)
    assert files.read_json(path) == 2
    assert capsys.readouterr().err.count("cannot make renames durable") == 1
