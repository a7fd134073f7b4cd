"""The pulse of a rank: what it is doing and since when, in memory that the process beside it reads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Phase = Literal[
    "set-up", "data", "forward", "backward", "update", "evaluate", "save", "convert", "export", "collective", "waiting"
]
"""In the order in which they follow each other between two milestones; `waiting` is for what rank 0 does alone."""
PHASES: tuple[Phase, ...] = get_args(Phase)
STOP_REASONS = ("", "the file STOP", "another rank, which was asked to")
SIZE = 128
_STAGE = slice(96, 128)
_BEAT, _LIMIT = 0, 1  # float64
_MILESTONE, _STEP, _PHASE, _RANK, _WORLD_SIZE, _ATTEMPT, _ENDED, _STOP = range(2, 10)  # int64


class Heartbeat:
    """One record. Each field is written at once (8 aligned bytes), so that a reader in another process sees no half of one.

    A milestone is a moment that all ranks pass in the same order: a step, a collective, a wait for rank 0. So (milestone, phase)
    tells which of two ranks is behind.

    Args:
        memory: SIZE bytes, writable; zeros for a new record.
        timeout: seconds without a beat after which a rank is stuck; 0: never.
    """

    def __init__(self, memory: memoryview | None = None, timeout: float = 0.0) -> None:
        memory = memoryview(bytearray(SIZE)) if memory is None else memory
        self._floats, self._ints, self._stage = memory[:96].cast("d"), memory[:96].cast("q"), memory[_STAGE]
        self._timeout = timeout
        self.patience = 0.0
        """Seconds that every phase may take at least, while models are compiled."""

    def identify(self, rank: int, world_size: int, attempt: int) -> None:
        self._ints[_RANK], self._ints[_WORLD_SIZE], self._ints[_ATTEMPT] = rank, world_size, attempt + 1

    def enter(self, phase: Phase, at_least: float = 0.0) -> None:
        """The rank begins `phase`, or goes on in it: it is alive. `at_least`: seconds that it may take though the timeout is less."""
        self._floats[_LIMIT] = max(self._timeout, self.patience, at_least) if self._timeout else 0.0
        self._ints[_PHASE] = PHASES.index(phase)
        self._floats[_BEAT] = time.monotonic()

    def begin(self, phase: Phase, at_least: float = 0.0) -> None:
        """A milestone, then `phase`."""
        self._ints[_MILESTONE] += 1
        self.enter(phase, at_least)

    @contextmanager
    def within(self, phase: Phase, at_least: float = 0.0) -> Iterator[None]:
        """`phase` while the body runs, then what it was; both are milestones."""
        before, limit = self.phase, self.limit
        self.begin(phase, at_least)
        yield  # an error ends the run, so that nobody reads what comes after it
        self.begin(before, limit)

    def at_step(self, stage: str, step: int) -> None:
        """The step that is being done, for the message."""
        self._ints[_STEP] = step
        name = stage.encode()[:32]
        self._stage[:] = name.ljust(32, b"\0")

    def end(self) -> None:
        """The rank needs nobody beside it any more."""
        self._ints[_ENDED] = 1

    # What follows is read by the process beside the rank.

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
        """(milestone, place of the phase): of two ranks the lesser is behind."""
        return self._ints[_MILESTONE], self._ints[_PHASE]

    @property
    def rank(self) -> int:
        return self._ints[_RANK]

    @property
    def world_size(self) -> int:
        return self._ints[_WORLD_SIZE]

    @property
    def attempt(self) -> int | None:
        """None until the run directory is open."""
        return self._ints[_ATTEMPT] - 1 if self._ints[_ATTEMPT] else None

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
        """Why the process beside the rank asks it to stop; empty where it does not."""
        return STOP_REASONS[self._ints[_STOP]]

    @stop_reason.setter
    def stop_reason(self, reason: str) -> None:
        self._ints[_STOP] = STOP_REASONS.index(reason)
