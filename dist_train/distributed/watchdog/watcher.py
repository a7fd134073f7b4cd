"""The process beside a rank: it ends the rank that cannot stop in time, and the run where a rank makes no progress.

`watchdog.watched` starts `python -m dist_train.distributed.watchdog.watcher`. It shares no lock with the rank, imports no torch, and ends with it.
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

from dist_train.distributed.watchdog.heartbeat import SIZE, STOP_REASONS, Heartbeat
from dist_train.distributed.watchdog.rank_side import STACK_SIGNAL
from dist_train.distributed.watchdog.verdict import Report, explained, verdict
from dist_train.errors import EXIT_FAILED, DistTrainError, StuckError
from dist_train.run_dir.files import read_json, replace_json
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.status import fail, preempt

_POLL_SECONDS = 0.5
_LONG_STEP_SECONDS = 2.0  # only a rank that is quiet for so long looks for files: the others agree in their steps
_LIVELY_SECONDS = 2.0  # between two looks for a question, of a rank that goes on
_GATHER_SECONDS = 8.0  # for the reports of all ranks
_STACKS_SECONDS = 3.0
_OBEY_SECONDS = 1.5  # between the order to end and SIGKILL
_SUSPENDED_SECONDS = 5.0  # that a sleep was too long by: this process did not run, and so the rank did not either


class Watcher:
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
        self._explained = 0.0
        self._questions = 0

    def run(self) -> None:
        while self._alive() and not self._pulse.ended:
            self._look_for_stop()
            self._look_for_stuck()
            self._sleep(_POLL_SECONDS)
        self._forget_last_question()

    def _sleep(self, seconds: float) -> None:
        """Less where the rank ends or gets a signal."""
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
            if self._signalled() or self._told():
                self._asked = time.monotonic()
            return
        self._signalled()  # empties the pipe: another signal changes nothing
        waited, attempt = time.monotonic() - self._asked, self._pulse.attempt
        if attempt is not None and waited > _LONG_STEP_SECONDS and self._pulse.world_size > 1:
            self._tell(self._run_dir.stopping(attempt))
        if waited >= self._grace:
            self._end_in_time(attempt)

    def _signalled(self) -> bool:
        numbers = b""
        with suppress(BlockingIOError):
            numbers = os.read(self._signals, 65536)
        return any(number in numbers for number in (signal.SIGTERM, signal.SIGUSR2))

    def _told(self) -> bool:
        """By the file STOP, or by another rank whose step is long. (Path.exists would raise what a file system says for a moment.)"""
        quiet, attempt = self._pulse.age > _LONG_STEP_SECONDS, self._pulse.attempt
        if (self._pulse.rank == 0 or quiet) and os.path.exists(self._run_dir.stop):
            self._pulse.stop_reason = STOP_REASONS[1]
        elif quiet and attempt is not None and os.path.exists(self._run_dir.stopping(attempt)):
            self._pulse.stop_reason = STOP_REASONS[2]
        return bool(self._pulse.stop_reason)

    def _tell(self, path: Path) -> None:
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
            f"rank {self._pulse.rank} was asked to stop and still was in `{self._pulse.phase}` after {self._grace:g} s: "
            "it ends here, and the last checkpoint serves\n  -> the same command resumes; --stop.grace gives it more time"
        )
        self._end(self._exit_code)

    def _look_for_stuck(self) -> None:
        limit = self._pulse.limit
        if not limit or self._pulse.ended:
            return
        # Where the whole job was suspended (Ctrl-Z, Slurm's gang scheduling), so was this process.
        now = time.monotonic()
        attempt, age = self._pulse.attempt, min(self._pulse.age, now - self._awake)
        overdue = age > limit and now - self._explained > limit
        if overdue or (attempt is not None and self._is_asked(attempt, quiet=age > limit / 4)):
            self._answer(attempt, age, limit)

    def _is_asked(self, attempt: int, quiet: bool) -> bool:
        """Whether another rank waits for too long, and so asks all: the one that it waits for may go on, or have just got stuck."""
        now = time.monotonic()
        if not quiet and now - self._looked < _LIVELY_SECONDS:
            return False
        self._looked = now
        return self._last_question(attempt) >= self._questions

    def _last_question(self, attempt: int) -> int:
        """The number of the last one; -1 where there was none."""
        with suppress(OSError):
            return max(self._run_dir.questions(attempt), default=-1)
        return -1

    def _answer(self, attempt: int | None, age: float, limit: float) -> None:
        """All ranks say how they are, and each draws the same conclusion: the run goes on, or ends."""
        pulse = self._pulse
        stacks = self._ask_for_stacks()
        own = Report(
            pulse.rank, pulse.stage, pulse.step, pulse.phase, pulse.position, age, limit, self._state(), bool(stacks)
        )
        if attempt is None:  # nobody knows the run directory yet
            self._end_stuck(None, [own])
        self._questions = max(self._questions, self._last_question(attempt))
        reports = self._gather(self._run_dir.asked(attempt, self._questions), own)
        if explained(reports):
            self._forget_last_question()  # all have answered a later one, so nobody reads it any more
            self._questions += 1
            self._explained = time.monotonic()
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
        """The rank's Python stacks; faulthandler writes them where the process can run at all."""
        before = size = os.fstat(self._stacks).st_size
        with suppress(ProcessLookupError):
            os.kill(self._pid, STACK_SIGNAL)
        end = time.monotonic() + _STACKS_SECONDS
        while time.monotonic() < end:
            time.sleep(0.1)
            now = os.fstat(self._stacks).st_size
            if now > before and now == size:  # it has ceased to grow
                break
            size = now
        return os.pread(self._stacks, size - before, before).decode(errors="replace")

    def _state(self) -> str:
        """The kernel's letter for the process: R running, S sleeping, D in the kernel (disk), T stopped."""
        try:
            return Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # no /proc here, or the process has just ended
            return "?"

    def _gather(self, folder: Path, own: Report) -> list[Report]:
        """What all ranks report, or those that do within a while."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_json(folder / f"rank{own.rank}.json", vars(own))
            end = time.monotonic() + _GATHER_SECONDS
            while time.monotonic() < end and len(list(folder.glob("rank*.json"))) < self._pulse.world_size:
                time.sleep(0.1)
            return [Report(**read_json(file)) for file in sorted(folder.glob("rank*.json"))]
        except (OSError, DistTrainError) as error:
            self._say(f"rank {own.rank} cannot say to the others where it is: {error}")
            return [own]

    def _keep(self, folder: Path, stacks: str) -> None:
        rank = self._pulse.rank
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank{rank}.txt").write_text(
                stacks or "this process could not run, and so not say where it is\n"
            )
        except OSError as error:
            self._say(f"the stacks of rank {rank} cannot be kept: {error}")

    def _say(self, text: str) -> None:
        print(f"dist-train: {text}", file=sys.stderr, flush=True)

    def _end(self, code: int) -> NoReturn:
        """The rank ends itself where it can run at all; else it is killed."""
        os.write(self._order, bytes([code]))
        end = time.monotonic() + _OBEY_SECONDS
        while self._alive() and time.monotonic() < end:
            time.sleep(0.02)
        if self._alive():
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        raise SystemExit(0)


def _pidfd(pid: int) -> int | None:
    """None where Python or the kernel (before 5.3, or in a container that forbids it) does not have them."""
    try:
        return os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    except OSError:
        return None


def main(given: dict[str, Any]) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the rank
    Watcher(**given).run()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
