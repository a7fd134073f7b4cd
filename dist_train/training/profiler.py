"""Profiles some optimizer steps with torch.profiler: a Chrome trace and a table of the slowest operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_ROWS = 10


class NoProfile:
    """Null object for a run without profiling."""

    def begin(self, step: int, total_steps: int) -> None:
        return

    def before_step(self, step: int) -> None:
        return

    def end(self) -> None:
        return


class Profile:
    """Records the optimizer steps [first, last) of a stage on this rank.

    Args:
        trace: path of the gzipped Chrome trace (for chrome://tracing or ui.perfetto.dev); the table goes beside it.
        say: prints a line of progress.
    """

    def __init__(self, stage: str, first: int, last: int, trace: Path, say: Callable[[str], None]) -> None:
        self._stage, self._first, self._last = stage, first, last
        self._trace, self._say = trace, say
        self._running: profile | None = None
        self._started_at = self._seen = 0

    def begin(self, step: int, total_steps: int) -> None:
        """Prints a line if the stage, which starts at `step`, lacks some of the requested steps."""
        asked = f"{self._stage}: profile.steps [{self._first}, {self._last})"
        if self._first >= total_steps:
            self._say(f"{asked} lie beyond the stage's {total_steps} steps: nothing is profiled")
        elif self._last > total_steps:
            self._say(f"{asked} reach beyond the stage's {total_steps} steps: only steps up to its end are profiled")
        if step >= self._last:
            self._say(f"{asked} lie before step {step}, where the stage resumes: nothing is profiled")

    def before_step(self, step: int) -> None:
        if step >= self._last:
            self.end()
        elif step >= self._first and self._running is None:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities)
            self._running.start()
            self._started_at = step
        self._seen = step

    def end(self) -> None:
        """Writes the recorded steps, if any; after an early stop or a failure, fewer than requested."""
        running, self._running = self._running, None
        if running is None:
            return
        running.stop()
        self._trace.parent.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(self._trace))
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=order, row_limit=_ROWS, max_name_column_width=44)
        steps = f"steps {self._started_at} to {min(self._seen, self._last - 1)}"
        text = f"{self._stage}: the {_ROWS} slowest operations of {steps}\n{table}"
        file = self._trace.with_name(self._trace.name.removesuffix(".json.gz") + ".txt")
        file.write_text(text)
        self._say(f"{text}trace        {self._trace}")
