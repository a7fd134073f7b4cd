"""Does one piece of work at a time in a thread beside the loop, and keeps its error for whoever waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Thread

from dist_train.errors import CheckpointError

Beat = Callable[[], None]
_LOOK_SECONDS = 0.2  # between looks for progress while somebody waits
_SILENT_SECONDS = 10.0  # without progress, after which a run that fails leaves the work
_LEAVE_SECONDS = 30.0  # after which it leaves the work in any case


class Background:
    """A thread for writing.

    The work gets a function that it must call while it makes progress, and before what cannot be undone. Once the work
    was left behind, that function raises. A thread that hangs in the kernel does not hold up the process's exit.

    Args:
        on_failure: called in the thread when the work has failed.
    """

    def __init__(self, on_failure: Callable[[], None] = lambda: None) -> None:
        self._on_failure = on_failure
        self._done = Event()
        self._done.set()
        self._error: BaseException | None = None
        self._beats = 0
        self._left = False

    @property
    def failed(self) -> bool:
        """True from a failure until `wait` has raised it."""
        return self._error is not None

    def start(self, work: Callable[[Beat], None]) -> None:
        """Begins the work; the former must be done, and must not have failed."""
        assert self._done.is_set() and self._error is None
        self._done.clear()
        Thread(target=self._run, args=(work,), name="checkpoint", daemon=True).start()

    def fail(self, error: BaseException) -> None:
        """Takes an error for one of the work."""
        self._error = error
        self._on_failure()

    def wait(self, beat: Beat) -> None:
        """Waits until the work is done, and raises its error, once. Calls `beat` whenever the work made progress."""
        self.finish(beat)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self, beat: Beat) -> None:
        """As `wait`, but leaves an error where it is."""
        seen = self._beats
        beat()
        while not self._done.wait(_LOOK_SECONDS):
            if self._beats != seen:
                seen = self._beats
                beat()

    def leave(self, beat: Beat) -> BaseException | None:
        """Ends the work as a run fails: waits while it makes progress, half a minute at most; returns its error."""
        began = moved = time.monotonic()
        seen = self._beats
        try:
            while not self._done.wait(_LOOK_SECONDS):
                now = time.monotonic()
                if self._beats != seen:
                    seen, moved = self._beats, now
                    beat()
                if now - moved > _SILENT_SECONDS or now - began > _LEAVE_SECONDS:
                    return CheckpointError("it is not written yet, and is given up", "look at the disk")
        finally:
            self._left = not self._done.is_set()
        error, self._error = self._error, None
        return error

    def _run(self, work: Callable[[Beat], None]) -> None:
        try:
            work(self._beat)
        except BaseException as error:  # raised by `wait`
            self.fail(error)
        finally:
            self._done.set()

    def _beat(self) -> None:
        self._beats += 1
        self.require_here()

    def require_here(self) -> None:
        """Raises CheckpointError where the work was left behind; for work that waits, which is no progress."""
        if self._left:
            raise CheckpointError("the run has ended meanwhile", "the same command resumes")
