"""A run directory on this machine whose home is an object store: taken from there, and brought back."""

from __future__ import annotations

import errno
import fcntl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_train.addresses import local_copy
from dist_train.errors import RunDirError, StoreError
from dist_train.run_dir.lease import RankProcess, owner, this_process
from dist_train.run_dir.mirror import Mirror
from dist_train.run_dir.store import Store
from dist_train.run_dir.store_lease import StoreLease, acquire

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0
_REST = 10.0  # times the seconds that a failed push took: a store that is away must not slow a run much


class WorkingCopy:
    """The run directory of one process that owns it at the store, too.

    Raises, when it is made:
        RunDirBusyError: another run uses it.
        RunDirError: there is something else at the address, or the working copy cannot be written.
        StoreError: the store does not answer.
    """

    def __init__(self, address: str, local: Path, process: RankProcess) -> None:
        store = Store(address)
        self._address, self._local, self._store = address, local, store
        self._behind, self._not_before = False, 0.0
        self._lease: StoreLease = acquire(store, process, say)
        self._mirror = Mirror(store, local, say)
        try:
            with on_disk(local):
                self._mirror.pull()
        except BaseException:
            self.close()
            raise

    def publish(self, beat: Callable[[], None] = lambda: None, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Pushes, such as after a checkpoint. A store that does not answer is only told of: the next push has it all.

        interrupted: once it is true the push is left where it is, even where the store does not answer.

        Raises:
            RunDirBusyError: another start has taken the run over.
        """
        began = time.monotonic()
        if began < self._not_before:
            return
        self._store.interrupted = interrupted
        try:
            self._push(beat)
        except StoreError as error:
            if interrupted():
                return
            if not self._behind:
                say(f"warning: {error.message}; the run goes on, and later checkpoints try again")
            self._behind = True
            now = time.monotonic()
            self._not_before = now + _REST * (now - began)
        else:
            if self._behind:
                say(f"{self._address} is up to date again")
            self._behind = False
        finally:
            self._store.interrupted = lambda: False

    def must_end(self, seconds: float) -> None:
        """Lets whatever is asked of the store fail from then on, even where it would still be answered."""
        self._store.ends = time.monotonic() + seconds

    def finish(self, seconds: float, beat: Callable[[], None] = lambda: None) -> None:
        """Pushes all there is, and tries again for some seconds.

        Args:
            beat: called while it goes on.

        Raises:
            StoreError: the store did not answer; says where the run is.
        """
        began, pause = time.monotonic(), _FIRST_PAUSE
        while True:
            try:
                return self._push(beat)
            except StoreError as error:
                waited = time.monotonic() - began
                if waited >= seconds:
                    hint = f"{error.hint}, on this machine: all of the run is in {self._local}"
                    raise StoreError(error.message, hint) from error
                if pause == _FIRST_PAUSE:
                    say(f"warning: {error.message}; it is tried again for {seconds:g} s")
                time.sleep(min(pause, max(0.0, seconds - waited)))
                pause = min(2 * pause, _LONGEST_PAUSE)

    def close(self) -> None:
        self._lease.release()

    def _push(self, beat: Callable[[], None] = lambda: None) -> None:
        def guarded() -> None:
            self._lease.require()
            beat()

        guarded()
        with on_disk(self._local):
            self._mirror.push(guarded)


@contextmanager
def opened(address: str, *, changes: bool) -> Iterator[Path]:
    """Gives the working copy of a run at a store, for a verb about a finished run.

    Args:
        changes: the body writes to it; what it wrote is brought back, and no run may use the address meanwhile.

    Raises:
        as WorkingCopy, and StoreError where it cannot be brought back.
    """
    local, store = local_copy(address, None), Store(address)
    if not store.sizes():
        raise RunDirError(f"there is no run at {address}", "give the address of a run, as its --run.dir was")
    if changes:
        copy = WorkingCopy(address, local, this_process(0))
        try:
            yield local
            copy.finish(0.0)
        finally:
            copy.close()
        return
    with on_disk(local), _one_at_a_time(local):  # ranks of a machine take one copy
        if not any(each.alive for each in owner(local)):  # else its run is at work here, and ahead of the store
            Mirror(store, local, say).pull()
    yield local


@contextmanager
def _one_at_a_time(local: Path) -> Iterator[None]:
    local.parent.mkdir(parents=True, exist_ok=True)
    with local.with_name(f".{local.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def on_disk(local: Path) -> Iterator[None]:
    """Turns an error of this machine's disk into a RunDirError, with what to type."""
    try:
        yield
    except OSError as error:
        hint = "--run.spool FOLDER, or XDG_CACHE_HOME=FOLDER where a verb has no --run.spool, one with room"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint += ", or make room there"
        raise RunDirError(f"the working copy {local} cannot be used: {error}", hint) from error


def say(text: str) -> None:
    print(f"dist-train: {text}", file=sys.stderr, flush=True)
