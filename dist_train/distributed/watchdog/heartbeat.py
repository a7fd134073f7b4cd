"""A rank's heartbeat: its phase, step and time of the last beat, in memory shared with its watcher process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Phase = Literal[
    "set-up", "data", "forward", "backward", "update", "evaluate", "save", "convert", "export", "collective", "waiting"
]
"""A rank's activities, in their order between two milestones. `waiting`: rank 0 works alone, and this rank waits."""
PHASES: tuple[Phase, ...] = get_args(Phase)
STOP_REASONS = ("", "the file STOP", "another rank was asked to stop")
VERDICT_SECONDS = 20.0  # upper bound from detecting a stuck rank to the end of the run
SIZE = 128
_STAGE = slice(96, 128)
_BEAT, _LIMIT = 0, 1  # float64
_MILESTONE, _STEP, _PHASE, _RANK, _WORLD_SIZE, _ATTEMPT, _ENDED, _STOP, _LEASE = range(2, 11)  # int64


class Heartbeat:
    """A record of a rank's progress, written by the rank and read by its watcher.

    Each field is 8 aligned bytes and is written at once, so a reader in another process never sees half of a value.
    A milestone is an event that all ranks pass in the same order: a step, a collective, a wait for rank 0. Comparing
    (milestone, phase) therefore tells which of two ranks is behind.

    Args:
        memory: SIZE writable bytes; zeros for a new record.
        timeout: seconds without a beat after which the rank counts as stuck; 0: never.
    """

    def __init__(self, memory: memoryview | None = None, timeout: float = 0.0) -> None:
        memory = memoryview(bytearray(SIZE)) if memory is None else memory
        self._floats, self._ints, self._stage = memory[:96].cast("d"), memory[:96].cast("q"), memory[_STAGE]
        self._timeout = timeout
        self.patience = 0.0
        """Minimum limit of every phase in seconds; raised while models are compiled."""

    @property
    def verdict_by(self) -> float:
        """Seconds within which a rank that waits for another learns that this one is stuck; 0 without a timeout."""
        return self._timeout + VERDICT_SECONDS if self._timeout else 0.0

    def identify(self, rank: int, world_size: int, attempt: int, lease: int | None = None) -> None:
        """Sets the rank's number, the world size, the attempt (0 at the first start), and rank 0's lease's number."""
        self._ints[_RANK], self._ints[_WORLD_SIZE], self._ints[_ATTEMPT] = rank, world_size, attempt + 1
        self._ints[_LEASE] = lease or 0

    def enter(self, phase: Phase, at_least: float = 0.0) -> None:
        """Records a beat: the rank begins `phase`, or is still making progress in it.

        at_least: seconds that the phase may take even if the timeout is shorter.
        """
        self._floats[_LIMIT] = max(self._timeout, self.patience, at_least) if self._timeout else 0.0
        self._ints[_PHASE] = PHASES.index(phase)
        self._floats[_BEAT] = time.monotonic()

    def begin(self, phase: Phase, at_least: float = 0.0) -> None:
        """Counts a milestone, then enters `phase`."""
        self._ints[_MILESTONE] += 1
        self.enter(phase, at_least)

    @contextmanager
    def within(self, phase: Phase, at_least: float = 0.0) -> Iterator[None]:
        """Enters `phase` while the body runs, then returns to the earlier phase; both count as milestones."""
        before, limit = self.phase, self.limit
        self.begin(phase, at_least)
        yield  # no `finally`: an error ends the run, so the earlier phase need not be restored
        self.begin(before, limit)

    def at_step(self, stage: str, step: int) -> None:
        """Sets the stage and step shown in the watcher's messages."""
        self._ints[_STEP] = step
        name = stage.encode()[:32]
        self._stage[:] = name.ljust(32, b"\0")

    def end(self) -> None:
        """Tells the watcher to exit: the rank is done."""
        self._ints[_ENDED] = 1

    # The watcher reads the properties below.

    @property
    def age(self) -> float:
        """Seconds since the last beat; 0 before the first."""
        beat = self._floats[_BEAT]
        return time.monotonic() - beat if beat else 0.0

    @property
    def limit(self) -> float:
        return self._floats[_LIMIT]

    @property
    def phase(self) -> Phase:
        return PHASES[self._ints[_PHASE]]

    @property
    def position(self) -> tuple[int, int]:
        """(milestone, index of the phase); of two ranks, the one with the smaller value is behind."""
        return self._ints[_MILESTONE], self._ints[_PHASE]

    @property
    def rank(self) -> int:
        return self._ints[_RANK]

    @property
    def world_size(self) -> int:
        return self._ints[_WORLD_SIZE]

    @property
    def attempt(self) -> int | None:
        """Number of the attempt; None until the run directory is open."""
        return self._ints[_ATTEMPT] - 1 if self._ints[_ATTEMPT] else None

    @property
    def lease(self) -> int | None:
        """Number of the lease that the watcher keeps alive; None on ranks without one."""
        return self._ints[_LEASE] or None

    @property
    def step(self) -> int:
        return self._ints[_STEP]

    @property
    def stage(self) -> str:
        return bytes(self._stage).rstrip(b"\0").decode(errors="replace")

    @property
    def ended(self) -> bool:
        return bool(self._ints[_ENDED])

    @property
    def stop_reason(self) -> str:
        """Reason why the watcher asks the rank to stop, one of STOP_REASONS; "" if it does not."""
        return STOP_REASONS[self._ints[_STOP]]

    @stop_reason.setter
    def stop_reason(self, reason: str) -> None:
        self._ints[_STOP] = STOP_REASONS.index(reason)
