"""The watcher process beside a rank: ends a rank that does not stop in time, and the run if a rank is stuck.

`rank_side.watched` starts `python -m dist_train.distributed.watchdog.watcher`. The watcher shares no lock with the
rank, imports no torch, and exits when the rank does.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from dist_train.distributed.polling import attempts
from dist_train.distributed.watchdog.exchange import ask_for_stacks, gather, keep_stacks, say, state_of
from dist_train.distributed.watchdog.heartbeat import SIZE, STOP_REASONS, Heartbeat
from dist_train.distributed.watchdog.verdict import Report, verdict, waiting_for_running_rank
from dist_train.errors import EXIT_FAILED, EXIT_PREEMPTED, DistTrainError, RankEndedError, StuckError
from dist_train.run_dir.lease import BEAT_SECONDS, Lease, owner
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.status import fail, preempt

_POLL_SECONDS = 0.5
_LONG_STEP_SECONDS = 2.0  # a rank with a shorter step learns of a stop from the step's own reduction
_LIVELY_SECONDS = 2.0  # between checks for another rank's question, while this rank makes progress
_OBEY_SECONDS = 1.5  # between the order to end and SIGKILL
_SUSPENDED_SECONDS = 5.0  # a sleep that is longer by this much means that the job was suspended, the rank too


class Watcher:
    """Watches one rank.

    Args:
        pid: process id of the rank.
        record: file descriptor of the heartbeat's memory.
        stacks: file descriptor that the rank's faulthandler writes stacks to.
        signals: read end of the pipe with the numbers of the signals that the rank got.
        order: write end of the pipe that tells the rank to exit; the byte is the exit code.
        run_dir: absolute path of the run directory.
        grace: seconds that the rank may take to stop.
        exit_code: exit code of a rank that did not stop in time.
        leaves_by: numbers of the signals by which torchrun's agent tells its ranks that their node leaves the run.
        restart_mark: file to make before the rank ends so that its agent goes on without another node; "": it cannot.
    """

    def __init__(
        self,
        pid: int,
        record: int,
        stacks: int,
        signals: int,
        order: int,
        run_dir: str,
        grace: float,
        exit_code: int,
        leaves_by: Sequence[int] = (),
        restart_mark: str = "",
    ) -> None:
        self._pid, self._signals, self._order, self._stacks = pid, signals, order, stacks
        self._pulse = Heartbeat(memoryview(mmap.mmap(record, SIZE)))
        self._run_dir = RunDir(Path(run_dir))
        self._grace, self._exit_code = grace, exit_code
        self._leaves_by, self._restart_mark = set(leaves_by), restart_mark
        self._got: set[int] = set()
        self._asked: float | None = None
        self._gone = _pidfd(pid)
        self._awake = self._looked = time.monotonic()
        self._cleared = 0.0
        self._questions = 0
        self._lease: threading.Thread | None = None
        self._taken_over = False

    def run(self) -> None:
        while self._alive() and not self._pulse.ended:
            self._look_at_lease()
            self._look_for_stop()
            self._look_for_stuck()
            self._sleep(_POLL_SECONDS)
        if not self._pulse.ended and self._asked is None and not self._signalled():
            self._tell_of_end()
        self._forget_last_question()

    def _tell_of_end(self) -> None:
        """Says that the rank's process is gone, which could not say why: a run must not look done, or merely stop."""
        pulse = self._pulse
        who = "a rank" if pulse.attempt is None else f"rank {pulse.rank}"
        where = f" in `{pulse.phase}`" + (f" of {pulse.stage} at step {pulse.step}" if pulse.stage else "")
        error = RankEndedError(
            f"the process of {who} ended without a word{where}: killed, crashed, or by os._exit in the run's code",
            "was memory short? dmesg tells; the same command goes on from the last checkpoint",
        )
        if pulse.attempt is not None:
            with suppress(OSError, DistTrainError):
                fail(self._run_dir, pulse.attempt, error)
        say(str(error))

    def _sleep(self, seconds: float) -> None:
        """Sleeps for `seconds`; returns early if the rank exits or gets a signal."""
        began = time.monotonic()
        select.select([self._signals] if self._gone is None else [self._signals, self._gone], [], [], seconds)
        if time.monotonic() - began > seconds + _SUSPENDED_SECONDS:
            self._awake = time.monotonic()

    def _alive(self) -> bool:
        if self._gone is not None:
            return not select.select([self._gone], [], [], 0)[0]
        return os.getppid() == self._pid

    def _look_at_lease(self) -> None:
        if self._lease is None and self._pulse.lease:
            # A thread, because a file system that hangs must not stop the watch.
            self._lease = threading.Thread(target=self._keep_lease, args=(self._pulse.lease,), daemon=True)
            self._lease.start()
        if self._taken_over:
            say(
                f"{self._run_dir.path} was taken over by another start, as this one was silent for too long: it ends\n"
                "  -> the other one goes on from the last checkpoint; start two runs with two --run.dir"
            )
            self._end(EXIT_FAILED)

    def _keep_lease(self, number: int) -> None:
        lease = Lease(self._run_dir.path, number)
        while not self._taken_over:
            time.sleep(BEAT_SECONDS)
            with suppress(OSError):  # the next beat may reach the file system again
                self._taken_over = not lease.beat()

    def _look_for_stop(self) -> None:
        if self._asked is None:
            if self._signalled() or self._stop_requested():
                self._asked = time.monotonic()
            return
        self._signalled()  # empties the pipe; a further signal changes nothing
        waited, attempt = time.monotonic() - self._asked, self._pulse.attempt
        if attempt is not None and waited > _LONG_STEP_SECONDS and self._pulse.world_size > 1:
            self._touch(self._run_dir.stopping(attempt))
            if self._got and self._got <= self._leaves_by:
                self._touch(self._run_dir.leaving(attempt))
        if waited >= self._grace:
            self._end_in_time(attempt)

    def _signalled(self) -> bool:
        numbers = b""
        with suppress(BlockingIOError):
            numbers = os.read(self._signals, 65536)
        found = {signal.SIGTERM, signal.SIGUSR2}.intersection(numbers)
        self._got |= found
        return bool(found)

    def _stop_requested(self) -> bool:
        """Tells whether the file STOP, or a rank with a long step, asks this rank to stop.

        Uses os.path.exists because Path.exists raises on a file system's temporary errors.
        """
        quiet, attempt = self._pulse.age > _LONG_STEP_SECONDS, self._pulse.attempt
        if (self._pulse.rank == 0 or quiet) and os.path.exists(self._run_dir.stop):
            self._pulse.stop_reason = STOP_REASONS[1]
        elif quiet and attempt is not None and os.path.exists(self._run_dir.stopping(attempt)):
            self._pulse.stop_reason = STOP_REASONS[2]
        return bool(self._pulse.stop_reason)

    def _touch(self, path: Path) -> None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def _end_in_time(self, attempt: int | None) -> None:
        if attempt is not None:
            with suppress(OSError, DistTrainError):
                preempt(self._run_dir, attempt)
        goes_on = attempt is not None and self._goes_on(attempt)
        if self._pulse.rank == 0:
            with suppress(OSError):
                self._run_dir.stop.unlink(missing_ok=True)
        say(
            f"rank {self._pulse.rank} was asked to stop and is still in `{self._pulse.phase}` after {self._grace:g} s: "
            "it is ended now\n"
            "  -> the same command resumes from the last checkpoint; --stop.grace SECONDS allows more time"
        )
        if goes_on:
            self._touch(Path(self._restart_mark))
            self._end(EXIT_PREEMPTED)
        self._end(self._exit_code)

    def _goes_on(self, attempt: int) -> bool:
        """Tells whether the rank's agent is to start it again, because another node leaves the run."""
        by_other = self._pulse.stop_reason == STOP_REASONS[2] and not self._got
        leaves = os.path.exists(self._run_dir.leaving(attempt)) and not os.path.exists(self._run_dir.stop)
        return bool(self._restart_mark) and by_other and leaves

    def _look_for_stuck(self) -> None:
        limit = self._pulse.limit
        if not limit or self._pulse.ended:
            return
        # If the whole job was suspended (Ctrl-Z, Slurm's gang scheduling), so was this process: count from its wake-up.
        now = time.monotonic()
        attempt, age = self._pulse.attempt, min(self._pulse.age, now - self._awake)
        overdue = age > limit and now - self._cleared > limit
        if overdue or (attempt is not None and self._question_pending(attempt, quiet=age > limit / 4)):
            self._answer(attempt, age, limit)

    def _question_pending(self, attempt: int, quiet: bool) -> bool:
        """Tells whether another rank has asked all ranks for a report, because it waited too long.

        The rank that it waits for may still run, or may be stuck.
        """
        now = time.monotonic()
        if not quiet and now - self._looked < _LIVELY_SECONDS:
            return False
        self._looked = now
        return self._last_question(attempt) >= self._questions

    def _last_question(self, attempt: int) -> int:
        """Returns the number of the newest question; -1 if there is none."""
        with suppress(OSError):
            return max(self._run_dir.questions(attempt), default=-1)
        return -1

    def _answer(self, attempt: int | None, age: float, limit: float) -> None:
        """Exchanges reports with all ranks. Each reaches the same conclusion from them: the run goes on, or ends."""
        pulse = self._pulse
        stacks = ask_for_stacks(self._pid, self._stacks)
        own = Report(
            pulse.rank,
            pulse.stage,
            pulse.step,
            pulse.phase,
            pulse.position,
            age,
            limit,
            state_of(self._pid),
            bool(stacks),
        )
        if attempt is None:  # the run directory is not open yet, so reports cannot be exchanged
            self._end_stuck(None, [own])
        self._questions = max(self._questions, self._last_question(attempt))
        reports = gather(self._run_dir.asked(attempt, self._questions), own, pulse.world_size)
        if waiting_for_running_rank(reports):
            self._forget_last_question()  # all ranks have answered a later one, so no rank reads it any more
            self._questions += 1
            self._cleared = time.monotonic()
            return
        keep_stacks(self._run_dir.stuck(attempt), pulse.rank, stacks)
        self._end_stuck(attempt, reports)

    def _forget_last_question(self) -> None:
        if self._pulse.rank == 0 and self._pulse.attempt is not None and self._questions:
            shutil.rmtree(self._run_dir.asked(self._pulse.attempt, self._questions - 1), ignore_errors=True)

    def _end_stuck(self, attempt: int | None, reports: Sequence[Report]) -> NoReturn:
        folder = None if attempt is None else self._run_dir.stuck(attempt)
        processes = {} if attempt is None else {each.rank: (each.pid, each.host) for each in owner(self._run_dir.path)}
        text, hint = verdict(reports, self._pulse.world_size or 1, folder, processes)
        error = StuckError(text, hint)
        if attempt is not None:
            with suppress(OSError, DistTrainError):
                fail(self._run_dir, attempt, error)
        if self._pulse.rank == min(report.rank for report in reports):
            say(str(error))
        self._end(EXIT_FAILED)

    def _end(self, code: int) -> NoReturn:
        """Tells the rank to exit with `code`; kills it if it cannot run."""
        os.write(self._order, bytes([code]))
        for _ in attempts(_OBEY_SECONDS, longest_pause=0.02):
            if not self._alive():
                break
        if self._alive():
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        raise SystemExit(0)


def _pidfd(pid: int) -> int | None:
    """Opens a pidfd; None if Python or the kernel (before 5.3, or restricted by a container) has none."""
    try:
        return os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    except OSError:
        return None


def main(given: dict[str, Any]) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # these signals are meant for the rank
    Watcher(**given).run()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
