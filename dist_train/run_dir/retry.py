"""Keeps a run going while its file system fails for a moment."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dist_train.errors import DistTrainError

T = TypeVar("T")
_MOMENTARY = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY),
    *(errno.EINTR, errno.ENOLCK, errno.ECONNRESET, errno.EHOSTDOWN, errno.ENETDOWN, errno.EREMOTEIO, errno.ENOTCONN),
}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_warned: set[str] = set()


def is_momentary(error: BaseException | None) -> bool:
    """True for an error of the file system that may pass: full, unreachable, or a stale handle of NFS.

    Of an error of ours its cause counts.
    """
    cause = error.__cause__ if isinstance(error, DistTrainError) else error
    return isinstance(cause, OSError) and cause.errno in _MOMENTARY


def retried(write: Callable[[], T], seconds: float, what: str, beat: Callable[[], None] = lambda: None) -> T:
    """Calls `write` until it succeeds. Its last error is raised after `seconds`, and any other kind at once.

    Args:
        what: names the file in the warning of the first failure.
        beat: called before each try, to show that this rank lives.
    """
    began, pause = time.monotonic(), _FIRST_PAUSE
    while True:
        beat()
        try:
            result = write()
        except (OSError, DistTrainError) as error:
            waited = time.monotonic() - began
            if not is_momentary(error) or waited >= seconds:
                raise
            if pause == _FIRST_PAUSE:
                _say(f"{what}: {error.__cause__ or error}; it is tried again for {seconds:g} s")
            time.sleep(min(pause, seconds - waited))
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            if pause != _FIRST_PAUSE:
                _say(f"{what}: written after {time.monotonic() - began:.1f} s")
            return result


def told(write: Callable[[], object], path: Path) -> bool:
    """Writes a file that only tells about the run. If that fails, the run goes on, and a warning is printed once.

    Returns:
        whether it was written.
    """
    try:
        write()
    except OSError as error:
        warn_once(f"{path} is not up to date, and the run goes on: {error.strerror or error}")
        return False
    return True


def warn_once(text: str) -> None:
    """Prints a warning, but only once in this process."""
    if text not in _warned:
        _warned.add(text)
        _say(text)


def _say(text: str) -> None:
    print(f"dist-train: warning: {text}", file=sys.stderr, flush=True)
