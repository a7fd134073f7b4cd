"""Worker processes that end, or cannot be started, are named in words, where the data is read and nowhere else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from dist_train.data.augment.steps import Augmentation
from dist_train.data.loader import Source
from dist_train.errors import DataError
from tests.data.test_foreign_datasets import refusal
from tests.support.raising_data import Rows


class Ending(Rows):
    """Ends the worker process that reads item 20."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self._how = how

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 20 and self._how == "exit":
            os._exit(3)
        elif index == 20:
            os.kill(os.getpid(), signal.Signals[self._how])
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("how", "said", "hint"),
    [
        ("SIGKILL", "was killed by SIGKILL", "--data.workers 1"),
        ("SIGBUS", "was killed by SIGBUS (/dev/shm", "--shm-size"),
        ("exit", "exited with code 3", "--data.workers 1"),
    ],
)
def test_a_worker_that_ends_is_named_with_how_it_ended(how: str, said: str, hint: str) -> None:
    error = refusal(Ending(how), workers=2)
    assert re.search(rf"^a worker process that reads the data ended: process \d+ {re.escape(said)}", error.message)
    assert hint in error.hint


def test_a_worker_that_ends_raises_nothing_outside_of_the_reading() -> None:
    source = Source(Rows(), Augmentation([], seed=0, mean=(), std=()), torch.device("cpu"), False, 1, 0)
    before = signal.getsignal(signal.SIGCHLD)
    reading = source.batches((np.arange(start, start + 2) for start in range(0, 24, 2)), None)
    next(reading)
    assert signal.getsignal(signal.SIGCHLD) is before, "torch's handler would raise wherever the rank is"
    (worker,) = source._loader._iterator._workers  # type: ignore[union-attr]
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # a handler of Python would run before the next line
    with pytest.raises(DataError, match=f"ended: process {worker.pid} was killed by SIGKILL"):
        list(reading)


_SMALL = """
import os
from tests.data.test_foreign_datasets import Rows, refusal
for size in (4, 12, 20, 48, 64):  # the semaphores of one queue or another find no room
    assert os.system(f"mount -o remount,size={size}k /dev/shm") == 0
    error = refusal(Rows(), workers=2)
    print(error.message, error.hint)
"""


@pytest.mark.slow
def test_shared_memory_without_room_for_semaphores_is_named() -> None:
    small = f"mount -t tmpfs -o size=4k tmpfs /dev/shm || exit 77; exec {sys.executable} -c '{_SMALL}'"
    words = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", small]
    found = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if found.returncode == 77 or found.stderr.startswith("unshare:"):
        pytest.skip(f"no mount of one's own here: {found.stderr[-200:]}")
    said = found.stdout.splitlines()
    assert len(said) == 5, found.stderr
    for line in said:
        assert "worker processes cannot be started: No space left on device, in shared memory (/dev/shm: " in line
        assert "--shm-size" in line
    assert "Traceback" not in found.stderr and "Exception ignored" not in found.stderr, found.stderr
