"""Progress: a bar on a terminal, lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import fcntl
import io
import itertools
import os
import pty
import struct
import termios
import threading

import pytest

from dist_train.console.progress import Progress


def steps(progress: Progress, first: int, total: int) -> None:
    progress.begin("train", total, first)
    for step in range(first + 1, total + 1):
        progress.step(step, 64, loss=1 / step, score=step / total, lr=0.1)
    progress.end()


def test_lines_come_at_an_interval_and_at_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()  # a clock that moves on by a second each time it is read: no test depends on real time
    monkeypatch.setattr("dist_train.console.progress.time.monotonic", lambda: float(next(ticks)))
    stream = io.StringIO()
    steps(Progress(True, 1e6, stream), 0, 50)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("train: step 50/50  loss 0.0200  acc 1.000  lr 0.1  ") and line.endswith(
        " samples/s  0 s left"
    )
    stream = io.StringIO()
    steps(Progress(True, 10, stream), 0, 50)
    assert 3 <= len(stream.getvalue().splitlines()) <= 20


def test_the_score_goes_by_the_tasks_name() -> None:
    stream = io.StringIO()
    progress = Progress(True, 1e6, stream)
    progress.begin("train", 1, 0, "mae")
    progress.step(1, 64, loss=0.5, score=0.25, lr=0.1)
    assert "  mae 0.250  " in stream.getvalue() and "acc" not in stream.getvalue()


def test_a_resumed_stage_counts_on_from_where_it_was() -> None:
    stream = io.StringIO()
    steps(Progress(True, 1e-9, stream), 40, 43)
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [
        "train: step 41/43",
        "train: step 42/43",
        "train: step 43/43",
    ]


def test_speed_leaves_out_the_first_step_which_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 100.0, 101.0, 103.0])  # of begin, and of the steps
    monkeypatch.setattr("dist_train.console.progress.time.monotonic", lambda: next(times))
    progress = Progress(False, 1.0, io.StringIO())
    progress.begin("train", 10, 0)
    for step in range(1, 4):
        progress.step(step, 60, 1.0, 0.5, 0.1)
    assert progress.samples_per_second == 120 / 3


def test_other_ranks_are_silent_and_still_know_their_speed() -> None:
    stream = io.StringIO()
    progress = Progress(False, 1e-9, stream)
    progress.say("hello")
    steps(progress, 0, 5)
    assert stream.getvalue() == "" and progress.samples_per_second > 0


def test_much_waiting_for_data_is_shown_and_its_remedy_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("dist_train.console.progress.time.monotonic", lambda: float(next(ticks)))
    stream = io.StringIO()
    progress = Progress(True, 1.0, stream)
    progress.data_hint = "--data.workers 4"
    progress.begin("train", 6, 0)
    for step, share in enumerate([0.1, 0.2, 0.35, 0.5, 0.0, 0.9], start=1):
        progress.step(step, 64, 1.0, 0.5, 0.1, data_wait=share)
    lines = stream.getvalue().splitlines()
    assert ["waits for data" in line for line in lines if line.startswith("train: step")] == [
        share > 0.2 for share in (0.1, 0.2, 0.35, 0.5, 0.0, 0.9)
    ]
    assert [line for line in lines if "train: step" not in line] == [
        "warning: train waits for data 35% of the time",
        "  -> --data.workers 4",
    ]


def test_a_stage_shorter_than_the_interval_gets_no_advice() -> None:
    stream = io.StringIO()
    progress = Progress(True, 1e6, stream)
    progress.data_hint = "--data.workers 4"
    progress.begin("train", 1, 0)
    progress.step(1, 64, 1.0, 0.5, 0.1, data_wait=0.9)
    assert "warning" not in stream.getvalue()


def test_a_warning_is_said_once() -> None:
    stream = io.StringIO()
    progress = Progress(True, 1.0, stream)
    for text in ("a", "b", "a"):
        progress.warn(text)
    assert stream.getvalue() == "warning: a\nwarning: b\n"


def on_terminal(columns: int) -> str:
    """Returns the output of some steps and two texts on a terminal of this width."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    received = bytearray()

    def read() -> None:
        try:
            while piece := os.read(master, 65536):
                received.extend(piece)
        except OSError:
            return  # Linux ends a pty so

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as stream:
        progress = Progress(True, 1e6, stream)
        progress.begin("train", 20, 4)
        for step in range(5, 21):
            progress.step(step, 64, 1 / step, step / 20, 0.1)
            if step == 10:
                progress.say("evaluated: top1 0.5")
        progress.end()
        progress.say("done")
    reader.join(10)
    os.close(master)
    return received.decode().replace("\r\n", "\n")


def test_a_terminal_shows_a_bar_and_texts_stay_above_it() -> None:
    text = on_terminal(160)
    assert "20/20" in text and "100%" in text and "loss=0.05" in text, text
    assert "step 20/20  loss" not in text, "a line of the other mode"
    lines = [line.rpartition("\r")[2] for line in text.split("\n")]
    assert "evaluated: top1 0.5" in lines and "done" in lines, text


def test_a_terminal_without_a_width_gets_lines() -> None:
    lines = on_terminal(0).splitlines()
    assert (
        lines[0] == "evaluated: top1 0.5"
        and lines[1].startswith("train: step 20/20  loss 0.05")
        and lines[2:] == ["done"]
    )


def test_escapes_in_names_do_not_reach_the_terminal() -> None:
    stream = io.StringIO()
    progress = Progress(True, 1e6, stream)
    progress.say("reads \x1b]0;owned\x07\x1b[2Jcat.png\nsecond line")
    progress.warn("skips \rcat.png")
    assert stream.getvalue() == ("reads \\x1b]0;owned\\x07\\x1b[2Jcat.png\nsecond line\nwarning: skips \\x0dcat.png\n")
