"""What rank 0 prints while it works: a bar on a terminal, a plain line at an interval elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """Prints on rank 0 only; other ranks are silent."""

    def __init__(self, enabled: bool, interval: float, stream: TextIO | None = None) -> None:
        self._enabled = enabled
        self._interval = interval
        self._stream = stream or sys.stdout
        # A terminal that does not know its width (a container's, before its size is set) shows no bar at all.
        self._terminal = self._stream.isatty() and os.get_terminal_size(self._stream.fileno()).columns > 0
        self._bar: tqdm[Any] | None = None
        self._meter = _Meter()

    def say(self, text: str) -> None:
        """A line of its own."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def begin(self, title: str, total: int, done: int, score_name: str = "acc") -> None:
        """Starts counting the steps of a stage, `done` of which lie behind; `score_name` stands before the score."""
        self._score_name = score_name
        self._title, self._total = title, total
        self._meter = _Meter()
        self._last_line = time.monotonic()
        if self._enabled and self._terminal:
            self._bar = tqdm(
                total=total, initial=done, desc=title, unit="step", file=self._stream, leave=True, dynamic_ncols=True
            )

    def step(self, step: int, samples: int, loss: float, score: float, lr: float) -> None:
        """One more step was done: `step` steps in all."""
        self._meter.add(step, samples)
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix(
                {
                    "loss": f"{loss:.4f}",
                    self._score_name: f"{score:.3f}",
                    "samples_s": f"{self._meter.samples_per_second:,.0f}",
                },
                refresh=False,
            )
        elif time.monotonic() - self._last_line >= self._interval or step == self._total:
            self._last_line = time.monotonic()
            left = (self._total - step) * self._meter.seconds_per_step
            self.say(
                f"{self._title}: step {step}/{self._total}  loss {loss:.4f}  {self._score_name} {score:.3f}  lr {lr:.4g}  "
                f"{self._meter.samples_per_second:,.0f} samples/s  {left:.0f} s left"
            )

    @property
    def samples_per_second(self) -> float:
        return self._meter.samples_per_second

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Meter:
    """Speed since the start of a stage in this process; the first step, which warms up, is left out."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._first_step = 0
        self._samples = 0
        self.samples_per_second = 0.0
        self.seconds_per_step = 0.0

    def add(self, step: int, samples: int) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start, self._first_step = now, step
            return
        self._samples += samples
        seconds = max(now - self._start, 1e-9)
        self.samples_per_second = self._samples / seconds
        self.seconds_per_step = seconds / (step - self._first_step)
