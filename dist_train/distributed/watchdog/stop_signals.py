"""Being asked to stop: SIGTERM and SIGUSR2 become a flag. What follows is agreed by all ranks at a step's end, never in a handler."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import multiprocessing.util as multiprocessing_exit
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from weakref import WeakSet

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h: a signal for when the parent is gone


class StopRequest:
    """Whether this rank was asked to stop, and by what."""

    def __init__(self) -> None:
        self.reason = ""

    @property
    def requested(self) -> bool:
        return bool(self.reason)

    def ask(self, reason: str) -> None:
        """Once or more often: the first reason stays."""
        self.reason = self.reason or reason


_current: StopRequest | None = None


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Takes the signals while the body runs; within another `listening` it is the other one's request.

    Only the main thread can take signals: in another one the request is made by the STOP file alone.
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
        request.ask(signal.Signals(number).name)

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
        assert multiprocessing_exit  # its own exit function is registered by the import, and so runs after ours
        atexit.register(_kill_workers)


def _restore_in_child() -> None:
    """A forked process is not the rank: a signal to it ends it, as it ends any process."""
    if _current is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


def ignore_until_exit() -> None:
    """For a process whose exit code is settled: it may take a second to end, and a signal is often sent twice."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held_back() -> Iterator[None]:
    """Processes that the body starts get no signal before they say what they do with it; this process gets its own a moment later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_workers: WeakSet[BaseProcess] = WeakSet()


@contextmanager
def starting_workers() -> Iterator[None]:
    """For what starts data workers, with `ignore_in_worker`: signals are held back, and the workers are killed when this process exits."""
    _prepare_children()  # also where nobody listens for signals
    before = set(multiprocessing.active_children())
    with held_back():
        yield
    _workers.update(set(multiprocessing.active_children()) - before)


def ignore_in_worker(worker: int) -> None:
    """As a DataLoader's `worker_init_fn`: a worker lives through a signal that is meant for all processes of a job, as the rank needs its
    batches to end a step. It then outlives `terminate` too, and is killed when the rank exits, or is killed itself.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_workers() -> None:
    """multiprocessing would terminate them, which they ignore, and wait. A user's own daemons are left to it."""
    alive = [worker for worker in _workers if worker.is_alive()]
    if alive:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes the death of a worker for a failure
    for worker in alive:
        worker.kill()
