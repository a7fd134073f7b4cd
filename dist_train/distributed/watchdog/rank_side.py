"""Starts the watcher: a small process beside each rank that reads the rank's heartbeat and sees its signals.

It is a process because a thread does not run while a C call holds the GIL. A stopped process (SIGSTOP) runs no threads.
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
from typing import TYPE_CHECKING

from dist_train.cluster.elastic import Agent
from dist_train.cluster.rank_plan import exit_code_when_preempted
from dist_train.distributed.watchdog.heartbeat import SIZE, Heartbeat
from dist_train.distributed.watchdog.stop_signals import SIGNALS, StopRequest, held_back

if TYPE_CHECKING:  # the watcher imports this module, and pydantic would take most of its start
    from dist_train.config.tree import Config

STACK_SIGNAL = signal.SIGRTMIN + 7  # no other library is known to use it; faulthandler handles it in C
NO_ORDER = 255
_ENDING_SECONDS = 5.0


@contextmanager
def watched(
    config: Config, stop: StopRequest, agent: Agent | None = None, restart_mark: Path | None = None
) -> Iterator[Heartbeat]:
    """Runs a watcher process (watcher.py) while the body runs; yields the heartbeat that this process must update.

    Args:
        agent: torchrun's agent, from which nodes may leave; None: no agent, or a fixed number of nodes.
        restart_mark: file that the watcher makes when it ends the rank so that the agent goes on without another node.
    """
    agent = agent or Agent()
    with ExitStack() as stack:
        record, stacks = (_shared_file(name, stack) for name in ("heartbeat", "stacks"))
        os.ftruncate(record, SIZE)
        memory = mmap.mmap(record, SIZE)  # never closed: the heartbeat's memory views may outlive the body
        heartbeat = Heartbeat(memoryview(memory), config.watchdog.timeout or 0.0)
        heartbeat.enter("set-up", at_least=config.run.timeout)
        signals, noted = _pipe(stack)
        ordered, order = _pipe(stack)
        os.set_blocking(signals, False)
        os.set_blocking(noted, False)
        _take_signals(noted, stop, stack)
        # The handler is C code, so it works even while another thread holds the GIL.
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
            "leaves_by": [each for each in SIGNALS if agent.elastic and each.name in agent.told_by],
            "restart_mark": str(restart_mark.absolute()) if restart_mark is not None and agent.may_go_on else "",
        }
        with held_back():  # until the watcher ignores them
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
            with suppress(BlockingIOError):  # a full pipe wakes the watcher, too
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
    # memfd_create is missing from Pythons built with an old C library, as many portable builds are.
    return stack.enter_context(tempfile.TemporaryFile(prefix=f"dist-train-{name}-")).fileno()


def _pipe(stack: ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return ends


def _take_signals(noted: int, stop: StopRequest, stack: ExitStack) -> None:
    """Makes Python's C-level signal handler write each signal's number to the pipe `noted`.

    The byte is written at once, even while Python-level handlers must wait for the main thread.
    """
    if threading.current_thread() is threading.main_thread():
        earlier = signal.set_wakeup_fd(noted, warn_on_full_buffer=False)
        stack.callback(signal.set_wakeup_fd, earlier)
    if stop.requested:  # the signal came before the pipe existed
        os.write(noted, bytes([signal.SIGTERM]))


def _end_when_ordered(ordered: int) -> None:
    """Exits this process with the code that the watcher sends, even if the main thread is blocked."""
    with os.fdopen(ordered, "rb", buffering=0) as file:
        code = file.read(1)
    if code and code[0] != NO_ORDER:
        os._exit(code[0])
