"""The rank's side of the watchdog: a small process beside each rank, which sees the rank's heartbeat and the signals that it gets.

It is a process because a thread does not run while a C call holds the interpreter's lock, and a stopped process runs nothing at all.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dist_train.cluster.rank_plan import exit_code_when_preempted
from dist_train.config.tree import Config
from dist_train.distributed.watchdog.heartbeat import SIZE, Heartbeat
from dist_train.distributed.watchdog.stop_signals import StopRequest, held_back

STACK_SIGNAL = signal.SIGRTMIN + 7  # nothing else is known to use it; faulthandler answers it in C
NO_ORDER = 255
_ENDING_SECONDS = 5.0


@contextmanager
def watched(config: Config, stop: StopRequest) -> Iterator[Heartbeat]:
    """Keeps a watcher (dist_train/distributed/watchdog/watcher.py) beside this process while the body runs; yields the heartbeat to keep up."""
    with ExitStack() as stack:
        record, stacks = (_shared_file(name, stack) for name in ("heartbeat", "stacks"))
        os.ftruncate(record, SIZE)
        memory = mmap.mmap(record, SIZE)  # not closed: the heartbeat's views of it may outlive the body
        heartbeat = Heartbeat(memoryview(memory), config.watchdog.timeout or 0.0)
        heartbeat.enter("set-up", at_least=config.run.timeout)
        signals, noted = _pipe(stack)
        ordered, order = _pipe(stack)
        os.set_blocking(signals, False)
        os.set_blocking(noted, False)
        _take_signals(noted, stop, stack)
        # In C, and so also where the interpreter's lock is held.
        faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
        stack.callback(faulthandler.unregister, STACK_SIGNAL)
        threading.Thread(target=_end_when_ordered, args=(os.dup(ordered),), daemon=True).start()
        given = {
            "pid": os.getpid(),
            "record": record,
            "stacks": stacks,
            "signals": signals,
            "order": order,
            "run_dir": str(Path(config.run_dir).absolute()),
            "grace": config.stop.grace,
            "exit_code": exit_code_when_preempted(os.environ),
        }
        with held_back():  # until it ignores them
            watcher = subprocess.Popen(
                [sys.executable, "-m", "dist_train.distributed.watchdog.watcher", json.dumps(given)],
                pass_fds=(record, stacks, signals, order),
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        try:
            yield heartbeat
        finally:
            heartbeat.end()
            with suppress(BlockingIOError):  # full, so that it wakes anyway
                os.write(noted, b"\0")
            try:
                watcher.wait(_ENDING_SECONDS)
            except subprocess.TimeoutExpired:
                watcher.kill()
                watcher.wait()
            os.write(order, bytes([NO_ORDER]))  # ends the thread


def _shared_file(name: str, stack: ExitStack) -> int:
    if hasattr(os, "memfd_create"):
        number = os.memfd_create(name)
        stack.callback(os.close, number)
        return number
    # Pythons that were built with an old C library, as many portable ones are, do not have it.
    return stack.enter_context(tempfile.TemporaryFile(prefix=f"dist-train-{name}-")).fileno()


def _pipe(stack: ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return ends


def _take_signals(noted: int, stop: StopRequest, stack: ExitStack) -> None:
    """The C-level handler writes each signal's number to `noted` at once, also while Python's handlers have to wait."""
    if threading.current_thread() is threading.main_thread():
        earlier = signal.set_wakeup_fd(noted, warn_on_full_buffer=False)
        stack.callback(signal.set_wakeup_fd, earlier)
    if stop.requested:  # before there was anybody to see it
        os.write(noted, bytes([signal.SIGTERM]))


def _end_when_ordered(ordered: int) -> None:
    """Ends this process with the exit code that the watcher orders, whatever the main thread waits for."""
    with os.fdopen(ordered, "rb", buffering=0) as file:
        code = file.read(1)
    if code and code[0] != NO_ORDER:
        os._exit(code[0])
