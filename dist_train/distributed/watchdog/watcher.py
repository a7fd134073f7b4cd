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
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from dist_train.distributed.polling import attempts
from dist_train.distributed.watchdog.heartbeat import SIZE, STOP_REASONS, Heartbeat
from dist_train.distributed.watchdog.rank_side import STACK_SIGNAL
from dist_train.distributed.watchdog.verdict import Report, verdict, waiting_for_running_rank
from dist_train.errors import EXIT_FAILED, DistTrainError, StuckError
from dist_train.run_dir.files import read_json, replace_json
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.status import fail, preempt

_POLL_SECONDS = 0.5
_LONG_STEP_SECONDS = 2.0  # a rank with a shorter step learns of a stop from the step's own reduction
_LIVELY_SECONDS = 2.0  # between checks for another rank's question, while this rank makes progress
_GATHER_SECONDS = 8.0  # how long to wait for the reports of all ranks
_STACKS_SECONDS = 3.0
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
    ) -> None:
        self._pid, self._signals, self._order, self._stacks = pid, signals, order, stacks
        self._pulse = Heartbeat(memoryview(mmap.mmap(record, SIZE)))
        self._run_dir = RunDir(Path(run_dir))
        self._grace, self._exit_code = grace, exit_code
        self._asked: float | None = None
        self._gone = _pidfd(pid)
        self._awake = self._looked = time.monotonic()
        self._cleared = 0.0
        self._questions = 0

    def run(self) -> None:
        while self._alive() and not self._pulse.ended:
            self._look_for_stop()
            self._look_for_stuck()
            self._sleep(_POLL_SECONDS)
        self._forget_last_question()

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

    def _look_for_stop(self) -> None:
        if self._asked is None:
            if self._signalled() or self._stop_requested():
                self._asked = time.monotonic()
            return
        self._signalled()  # empties the pipe; a further signal changes nothing
        waited, attempt = time.monotonic() - self._asked, self._pulse.attempt
        if attempt is not None and waited > _LONG_STEP_SECONDS and self._pulse.world_size > 1:
            self._touch(self._run_dir.stopping(attempt))
        if waited >= self._grace:
            self._end_in_time(attempt)

    def _signalled(self) -> bool:
        numbers = b""
        with suppress(BlockingIOError):
            numbers = os.read(self._signals, 65536)
        return any(number in numbers for number in (signal.SIGTERM, signal.SIGUSR2))

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
        if self._pulse.rank == 0:
            with suppress(OSError):
                self._run_dir.stop.unlink(missing_ok=True)
        self._say(
            f"rank {self._pulse.rank} was asked to stop and is still in `{self._pulse.phase}` after {self._grace:g} s: "
            "it is ended now\n"
            "  -> the same command resumes from the last checkpoint; --stop.grace SECONDS allows more time"
        )
        self._end(self._exit_code)

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
        stacks = self._ask_for_stacks()
        own = Report(
            pulse.rank, pulse.stage, pulse.step, pulse.phase, pulse.position, age, limit, self._state(), bool(stacks)
        )
        if attempt is None:  # the run directory is not open yet, so reports cannot be exchanged
            self._end_stuck(None, [own])
        self._questions = max(self._questions, self._last_question(attempt))
        reports = self._gather(self._run_dir.asked(attempt, self._questions), own)
        if waiting_for_running_rank(reports):
            self._forget_last_question()  # all ranks have answered a later one, so no rank reads it any more
            self._questions += 1
            self._cleared = time.monotonic()
            return
        self._keep(self._run_dir.stuck(attempt), stacks)
        self._end_stuck(attempt, reports)

    def _forget_last_question(self) -> None:
        if self._pulse.rank == 0 and self._pulse.attempt is not None and self._questions:
            shutil.rmtree(self._run_dir.asked(self._pulse.attempt, self._questions - 1), ignore_errors=True)

    def _end_stuck(self, attempt: int | None, reports: Sequence[Report]) -> NoReturn:
        folder = None if attempt is None else self._run_dir.stuck(attempt)
        text, hint = verdict(reports, self._pulse.world_size or 1, folder)
        error = StuckError(text, hint)
        if attempt is not None:
            with suppress(OSError, DistTrainError):
                fail(self._run_dir, attempt, error)
        if self._pulse.rank == min(report.rank for report in reports):
            self._say(str(error))
        self._end(EXIT_FAILED)

    def _ask_for_stacks(self) -> str:
        """Returns the rank's Python stacks, which faulthandler writes on a signal; "" if the process cannot run."""
        before = size = os.fstat(self._stacks).st_size
        with suppress(ProcessLookupError):
            os.kill(self._pid, STACK_SIGNAL)
        end = time.monotonic() + _STACKS_SECONDS
        while time.monotonic() < end:
            time.sleep(0.1)  # long enough for a file that does not grow to be complete
            now = os.fstat(self._stacks).st_size
            if now > before and now == size:  # the file has stopped growing
                break
            size = now
        return os.pread(self._stacks, size - before, before).decode(errors="replace")

    def _state(self) -> str:
        """Returns the kernel's state of the rank: R running, S sleeping, D in the kernel (disk), T stopped."""
        try:
            return Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # no /proc on this system, or the process has just ended
            return "?"

    def _gather(self, folder: Path, own: Report) -> list[Report]:
        """Writes this rank's report, and returns the reports of all ranks that arrive in time."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_json(folder / f"rank{own.rank}.json", vars(own))
            for _ in attempts(_GATHER_SECONDS):
                if len(list(folder.glob("rank*.json"))) >= self._pulse.world_size:
                    break
            return [Report(**read_json(file)) for file in sorted(folder.glob("rank*.json"))]
        except (OSError, DistTrainError) as error:
            self._say(f"rank {own.rank} cannot write its report for the other ranks: {error}")
            return [own]

    def _keep(self, folder: Path, stacks: str) -> None:
        rank = self._pulse.rank
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank{rank}.txt").write_text(stacks or "this process could not run, so it wrote no stack\n")
        except OSError as error:
            self._say(f"the stacks of rank {rank} cannot be written: {error}")

    def _say(self, text: str) -> None:
        print(f"dist-train: {text}", file=sys.stderr, flush=True)

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
