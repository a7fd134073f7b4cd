"""Which rank holds the others up, from what the process beside each saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_HINTS = {
    "data": "look at where its samples come from (a slow or hanging file system, data.workers) and at its stack",
    "save": "look at the file system of the run directory",
    "collective": "look at the network between the machines; dist-train doctor",
}
_STOPPED = ("T", "t")


@dataclass(frozen=True)
class Report:
    """What the watcher of one rank saw.

    Attributes:
        position: (milestone, place of the phase), as in Heartbeat: the least is behind the others.
        age: seconds since the last beat; limit: how many were allowed.
        state: the kernel's letter for the process.
        answered: its stacks could be had.
    """

    rank: int
    stage: str
    step: int
    phase: str
    position: Sequence[int]
    age: float
    limit: float
    state: str
    answered: bool


def verdict(reports: Sequence[Report], world_size: int, folder: Path | None) -> tuple[str, str]:
    """The message and the hint for what was seen, stuck ranks first."""
    stuck = culprits(reports)
    silent = sorted(set(range(world_size)) - {report.rank for report in reports})
    longest = max(reports, key=lambda report: report.age)
    where = f" in {longest.stage} at step {longest.step}" if longest.stage else ""
    said = [f"no progress for {longest.age:.0f} s{where}"]
    if silent:
        said.append(
            f"no word from {_ranks(silent)}: the process or its machine is gone, or does not see the run directory"
        )
    if len(stuck) < world_size or world_size == 1:
        said.append("; ".join(f"rank {report.rank} is stuck in `{report.phase}`{_how(report)}" for report in stuck))
    elif not silent:
        said.append(f"all ranks are in `{stuck[0].phase}`, none behind the others")
    waiting = [report for report in reports if report not in stuck]
    if waiting:
        said.append("; ".join(f"rank {report.rank} waits in `{report.phase}`" for report in waiting))
    hint = _HINTS.get("collective" if silent or len(stuck) == world_size > 1 else stuck[0].phase, "look at its stack")
    if folder is not None:
        hint += f": {folder}"
    return ", ".join(said), f"{hint}\n  -> if this takes so long by right, raise --watchdog.timeout ({longest.limit:g})"


def explained(reports: Sequence[Report]) -> bool:
    """Whether those that are overdue wait for one that is behind them and goes on, so that nobody is stuck."""
    overdue = [report for report in reports if report.age > report.limit]
    going_on = [report for report in reports if report.age <= report.limit and report.state not in _STOPPED]
    return any(all(tuple(one.position) < tuple(late.position) for late in overdue) for one in going_on)


def culprits(reports: Sequence[Report]) -> list[Report]:
    """Those that cannot run, else those that are behind."""
    stopped = [report for report in reports if report.state in _STOPPED]
    least = min(tuple(report.position) for report in reports)
    return stopped or [report for report in reports if tuple(report.position) == least]


def _how(report: Report) -> str:
    if report.state in _STOPPED:
        return " (the process is stopped: SIGSTOP)"
    if report.state == "D":
        return " (in the kernel: a disk or a network file system does not answer)"
    return "" if report.answered else " (it cannot say where)"


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"
