"""Shows rank 0's progress: a bar on a terminal, elsewhere a plain line at an interval."""

from __future__ import annotations

import os
import string
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

from dist_train.errors import Problem, printable

_MUCH_WAITING = 0.2  # share of the time spent waiting for data, above which it is shown


class Progress:
    """Prints on rank 0 only; other ranks are silent.

    Attributes:
        data_hint: what to type where the loop waits for data; shown once, then cleared.
    """

    def __init__(self, enabled: bool, interval: float, stream: TextIO | None = None) -> None:
        self.data_hint = ""
        self._warned: set[str] = set()
        self._enabled = enabled
        self._interval = interval
        self._stream = stream or sys.stdout
        # Without a known width (in a container, before the size is set) a terminal shows no bar.
        self._terminal = self._stream.isatty() and os.get_terminal_size(self._stream.fileno()).columns > 0
        self._bar: tqdm[Any] | None = None
        self._meter = _Meter()

    def say(self, text: str) -> None:
        """Prints a line of its own. Names in it may be anybody's: it is made `printable`."""
        if not self._enabled:
            return
        text = printable(text)
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def warn(self, text: str) -> None:
        """Prints a warning, but only once."""
        if text not in self._warned:
            self._warned.add(text)
            self.say(f"warning: {text}")

    def begin(self, title: str, total: int, done: int, score_name: str = "acc") -> None:
        """Starts counting a stage's steps, of which `done` are done; `score_name` is printed before the score."""
        self._score_name = score_name
        self._title, self._total, self._first = title, total, done + 1
        self._meter = _Meter()
        self._last_line = time.monotonic()
        if self._enabled and self._terminal:
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=printable(title),
                unit="step",
                file=self._stream,
                leave=True,
                dynamic_ncols=True,
            )

    def step(self, step: int, samples: int, loss: float, score: float, lr: float, data_wait: float = 0.0) -> None:
        """Counts a step: `step` steps are done; `data_wait` is the share of the time spent waiting for data."""
        self._meter.add(step, samples)
        if not self._enabled:
            return
        waiting = data_wait > _MUCH_WAITING
        due = time.monotonic() - self._last_line >= self._interval
        if due:
            self._last_line = time.monotonic()
        if self._bar is not None:
            self._bar.update(1)
            shown = {
                "loss": f"{loss:.4f}",
                self._score_name: f"{score:.3f}",
                "samples_s": f"{self._meter.samples_per_second:,.0f}",
            }
            self._bar.set_postfix(shown | ({"data_wait": f"{data_wait:.0%}"} if waiting else {}), refresh=False)
        elif due or step == self._total:
            left = (self._total - step) * self._meter.seconds_per_step
            self.say(
                f"{self._title}: step {step}/{self._total}  loss {loss:.4f}  {self._score_name} {score:.3f}  "
                f"lr {lr:.4g}  {self._meter.samples_per_second:,.0f} samples/s  "
                + (f"waits for data {data_wait:.0%}  " if waiting else "")
                + f"{left:.0f} s left"
            )
        # No advice in a stage that is shorter than the interval, and none by the first step, which starts what reads.
        if waiting and due and self.data_hint and step > self._first:
            self.warn(f"{self._title} waits for data {data_wait:.0%} of the time\n  -> {self.data_hint}")
            self.data_hint = ""

    @property
    def samples_per_second(self) -> float:
        return self._meter.samples_per_second

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Meter:
    """Measures the speed since a stage's start in this process, without the first step, which warms up."""

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


_OWN = ("stage", "epoch", "epochs")
COUNTS = ("count", "skipped_samples")  # metrics that count samples


def epoch_line(template: str, stage: str, epoch: int, epochs: int, metrics: Mapping[str, float | int]) -> str:
    """Formats an epoch, counted from 1: "Epoch {epoch}/{epochs}, Acc: {top1:.4%}" gives "Epoch 1/10, Acc: 91.5300%"."""
    return template.format(**{**metrics, "stage": stage, "epoch": epoch, "epochs": epochs})


def plain_line(stage: str, epoch: int, epochs: int, metrics: Mapping[str, float | int]) -> str:
    """Formats an epoch without a template."""
    shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name not in COUNTS)
    without = metrics.get("skipped_samples")
    return f"{stage}: epoch {epoch}/{epochs} evaluated: {shown} on {metrics['count']} samples" + (
        f", without {without} that cannot be decoded" if without else ""
    )


def check_epoch_format(template: str, metrics: Iterable[str]) -> list[Problem]:
    """Checks a template for an evaluation of these metrics: unknown fields, or formats that a field does not take."""
    fields = [*_OWN, *metrics, "count"]
    hint = f"the fields are {', '.join(fields)}, as in 'Epoch [{{epoch}}/{{epochs}}]  loss {{loss:.4f}}'"
    try:
        # Attributes and items of a field are refused: the whole name must be known.
        used = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        unknown = [name for name in used if name not in fields]
        if unknown:
            return [Problem("log.epoch_format", f"has no field {unknown[0]!r}", hint=hint)]
        epoch_line(template, "train", 1, 1, {**dict.fromkeys(metrics, 0.5), "count": 1})
    except (ValueError, KeyError, IndexError) as error:
        return [Problem("log.epoch_format", f"cannot be formatted: {error}", hint=hint)]
    return []
