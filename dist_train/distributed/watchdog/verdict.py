"""Decides from the watchers' reports which rank is stuck, and words the error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_HINTS = {
    "data": "check where its samples come from (a slow or hanging file system, data.workers) and its stack",
    "save": "check the file system of the run directory",
    "collective": "check the network between the machines; dist-train doctor",
}
_FEW = 4
_STOPPED = ("T", "t")


@dataclass(frozen=True)
class Report:
    """The watcher's report on one rank.

    Attributes:
        position: (milestone, index of the phase), as in Heartbeat; the rank with the smallest value is behind.
        age: seconds since the last beat.
        limit: seconds allowed without a beat.
        state: the kernel's one-letter state of the process, as in /proc/PID/stat.
        answered: True if the rank wrote its Python stacks when asked.
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


def verdict(
    reports: Sequence[Report], world_size: int, folder: Path | None, processes: Mapping[int, tuple[int, str]]
) -> tuple[str, str]:
    """Returns the error's message, stuck ranks first, and its hint.

    Args:
        folder: where the stacks of the ranks are; None if they could not be kept.
        processes: process id and host of each rank, as far as they are known.
    """
    stuck = stuck_ranks(reports)
    silent = sorted(set(range(world_size)) - {report.rank for report in reports})
    longest = max(reports, key=lambda report: report.age)
    where = f" in {longest.stage} at step {longest.step}" if longest.stage else ""
    said = [f"no progress for {longest.age:.0f} s{where}"]
    if silent:
        told = _ranks(silent) + "".join(f" (process {pid} on {host})" for pid, host in _known(silent, processes))
        said.append(f"no report from {told}: it is gone or frozen, or does not see the run directory")
    if len(stuck) < world_size or world_size == 1:
        said.append("; ".join(f"rank {report.rank} is stuck in `{report.phase}`{_how(report)}" for report in stuck))
    elif not silent:
        said.append(f"all ranks are in `{stuck[0].phase}`, none behind the others")
    waiting = [report for report in reports if report not in stuck]
    if waiting:
        said.append("; ".join(f"rank {report.rank} waits in `{report.phase}`" for report in waiting))
    hint = _HINTS.get("collective" if silent or len(stuck) == world_size > 1 else stuck[0].phase, "check its stack")
    if folder is not None:
        hint += f": {folder}"
    for pid, host in _known(silent, processes):
        hint += f"\n  -> where its process is still there, nobody else can end it: kill -KILL {pid}, on {host}"
    return ", ".join(said), f"{hint}\n  -> if it may take that long, raise --watchdog.timeout ({longest.limit:g})"


def waiting_for_running_rank(reports: Sequence[Report]) -> bool:
    """Tells whether all overdue ranks wait for a rank that is behind them and still runs; then no rank is stuck."""
    overdue = [report for report in reports if report.age > report.limit]
    running = [report for report in reports if report.age <= report.limit and report.state not in _STOPPED]
    return any(all(tuple(one.position) < tuple(late.position) for late in overdue) for one in running)


def stuck_ranks(reports: Sequence[Report]) -> list[Report]:
    """Returns the ranks whose process is stopped; if there are none, the ranks that are behind all others."""
    stopped = [report for report in reports if report.state in _STOPPED]
    least = min(tuple(report.position) for report in reports)
    return stopped or [report for report in reports if tuple(report.position) == least]


def _known(ranks: Sequence[int], processes: Mapping[int, tuple[int, str]]) -> list[tuple[int, str]]:
    """Returns process id and host of the first few of these ranks."""
    return [processes[rank] for rank in ranks if rank in processes][:_FEW]


def _how(report: Report) -> str:
    if report.state in _STOPPED:
        return " (the process is stopped: SIGSTOP)"
    if report.state == "D":
        return " (in the kernel: a disk or a network file system does not answer)"
    return "" if report.answered else " (it wrote no stack)"


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"
