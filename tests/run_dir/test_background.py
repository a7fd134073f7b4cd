"""Work in a thread beside the loop: its errors, its progress, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event

import pytest

from dist_train.run_dir import background as module
from dist_train.run_dir.background import Background


def nothing() -> None:
    return


def test_an_error_is_raised_once_where_somebody_waits() -> None:
    told: list[bool] = []
    background = Background(lambda: told.append(True))

    def fail(beat: Callable[[], None]) -> None:
        raise OSError("full")

    background.start(fail)
    background.finish(nothing)
    assert background.failed and told == [True]
    with pytest.raises(OSError, match="full"):
        background.wait(nothing)
    assert not background.failed
    background.wait(nothing)


def test_who_waits_beats_only_while_the_work_makes_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    background, begun, go, beats = Background(), Event(), Event(), []

    def work(beat: Callable[[], None]) -> None:
        begun.wait(10)
        beat()
        go.wait(10)

    def beat() -> None:
        beats.append(1)
        begun.set()

    background.start(work)
    done = background._done.wait
    waits = iter(range(5))

    def wait(seconds: float) -> bool:
        if len(beats) == 2 and next(waits, None) is None:
            go.set()
        return done(seconds)

    monkeypatch.setattr(background._done, "wait", wait)
    background.wait(beat)
    assert len(beats) == 2, "one when the wait begins, one for the work's"


def test_work_that_hangs_is_left_and_cannot_commit_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENT_SECONDS", 0.05)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    background, go, committed = Background(), Event(), []

    def work(beat: Callable[[], None]) -> None:
        go.wait(10)
        beat()
        committed.append(True)

    background.start(work)
    assert "given up" in str(background.leave(nothing))
    go.set()
    background.finish(nothing)
    assert not committed


def test_work_that_makes_progress_is_finished_as_a_run_fails() -> None:
    background, committed = Background(), []
    background.start(lambda beat: committed.append(True))
    assert background.leave(nothing) is None and committed
