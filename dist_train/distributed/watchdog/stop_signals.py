"""Turns SIGTERM and SIGUSR2 into a flag, and keeps them from ending data workers.

The handlers only set the flag. All ranks agree at the end of a step whether to stop.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import multiprocessing.util as multiprocessing_exit
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from weakref import WeakSet

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h: sets the signal that a process gets when its parent ends


class StopRequest:
    """Records that this rank was asked to stop, and the reason.

    Attributes:
        signals: names of the stop signals that this process got.
        since: time of the first of them, by time.monotonic().
    """

    def __init__(self) -> None:
        self.reason = ""
        self.signals: set[str] = set()
        self.since = 0.0

    @property
    def requested(self) -> bool:
        return bool(self.reason)

    def signal(self, name: str) -> None:
        """Requests a stop because of a signal."""
        self.since = self.since or time.monotonic()
        self.signals.add(name)
        self.ask(name)

    def ask(self, reason: str) -> None:
        """Requests a stop; of several reasons, the first is kept."""
        self.reason = self.reason or reason


_current: StopRequest | None = None


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Handles the stop signals while the body runs, and yields the request. A nested call yields the outer request.

    Python delivers signals to the main thread only. In another thread only the file STOP can request a stop.
    """
    global _current
    if _current is not None:
        yield _current
        return
    request = _current = StopRequest()
    try:
        with _handlers(request):
            yield request
    finally:
        _current = None


@contextmanager
def _handlers(request: StopRequest) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _prepare_children()

    def note(number: int, frame: FrameType | None) -> None:
        request.signal(signal.Signals(number).name)

    earlier = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


_prepared = False


def _prepare_children() -> None:
    global _prepared
    if not _prepared:
        _prepared = True
        os.register_at_fork(after_in_child=_restore_in_child)
        assert multiprocessing_exit  # importing it registers its exit function, which then runs after _kill_workers
        atexit.register(_kill_workers)


def _restore_in_child() -> None:
    """Restores the default signal handlers in a forked process, so that a signal ends it."""
    if _current is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def ignore_until_exit() -> None:
    """Ignores the stop signals until the process exits, once its exit code is decided.

    The exit may take a second, and launchers often send a signal twice.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held_back() -> Iterator[None]:
    """Blocks the stop signals while the body starts processes.

    The processes inherit the blocked signals, so no signal ends them before they set their own handling. Signals to
    this process are delivered after the body.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_workers: WeakSet[BaseProcess] = WeakSet()


@contextmanager
def starting_workers() -> Iterator[None]:
    """Blocks the stop signals while the body starts data workers; kills those workers when this process exits.

    Where the body fails, those that it has started are killed at once. The handler of SIGCHLD stays as it was.

    The workers must use `ignore_in_worker` as their `worker_init_fn`.
    """
    _prepare_children()  # also where nobody listens for signals
    before, on_end = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
    try:
        with held_back():
            yield
    except BaseException:
        for worker in set(multiprocessing.active_children()) - before:
            worker.kill()
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_end)  # torch has set its own
    _workers.update(set(multiprocessing.active_children()) - before)


def ignore_in_worker(worker: int) -> None:
    """Makes a data worker ignore the stop signals; pass it to DataLoader as `worker_init_fn`.

    Launchers often signal all processes of a job, but the rank still needs the worker's batches to finish its step. The
    worker ignores `terminate` as well, so it is killed when the rank exits or dies.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_workers() -> None:
    """Kills the data workers. multiprocessing would send SIGTERM, which they ignore, and wait for them.

    Other daemon processes, such as a user's own, are left to multiprocessing.
    """
    alive = [worker for worker in _workers if worker.is_alive()]
    if alive:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report the killed worker as a failure
    for worker in alive:
        worker.kill()
