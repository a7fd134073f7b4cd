"""Checks of the doctor with planted faults, and a correct one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dist_train.doctor.base import Line, Subject, bad, good, warning


def chatters(subject: Subject) -> Iterator[Line]:
    """Prints from Python and from C, as libraries do; the answer must not contain it."""
    print("a banner")
    os.write(1, b"another one\n")
    yield good("all is well")
    yield warning("not quite", "type this")
    yield bad(f"{subject.run_dir} {subject.wanted}", "type that")


def raises(subject: Subject) -> Iterator[Line]:
    yield good("half an answer")
    raise KeyError("planted")


def is_killed(subject: Subject) -> Iterator[Line]:
    os.kill(os.getpid(), signal.SIGSEGV)
    yield good("never")


def hangs(subject: Subject) -> Iterator[Line]:
    """Hangs with a child process, whose id it writes to a file in `run_dir`."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    Path(subject.run_dir, "started").write_text(str(process.pid))
    time.sleep(100)
    yield good("never")


def crashes_at_its_end(subject: Subject) -> Iterator[Line]:
    import atexit

    atexit.register(os.abort)
    yield good("the answer")
