"""Checks the limits of the system: shared memory, open files, cores."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from dist_train.cluster.instructions import WITHOUT_VNNI, sums_overflow
from dist_train.data.shared_memory import HINT, PREFETCH, SHM, described, mebibytes, needed, sizes
from dist_train.doctor.base import Line, Subject, good, warning

_CGROUP = Path("/sys/fs/cgroup")
_SMALL_SHM = 256 * 2**20  # a container's default is 64 MiB; a data worker hands over batches through it
_FEW_FILES = 4096


def check_shared_memory(subject: Subject) -> Iterator[Line]:
    if not SHM.is_dir():
        yield warning("/dev/shm is not there: data workers hand over batches through it", "--data.workers 0")
        return
    free, text = sizes()[1], described()
    if free < needed(subject.workers, subject.batch_bytes):
        full = mebibytes(needed(subject.workers, subject.batch_bytes))
        batches = f"the batches of {subject.workers} data workers may need {full}"
        yield warning(f"{text}: {batches} ({PREFETCH} each, of {mebibytes(subject.batch_bytes)})", HINT)
    elif free < _SMALL_SHM:
        yield warning(f"{text}: little for data workers", HINT)
    else:
        yield good(text)


def check_limits(subject: Subject) -> Iterator[Line]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"open files: at most {_limit(soft)} (ulimit -n could raise it to {_limit(hard)})"
    few = soft != resource.RLIM_INFINITY and soft < _FEW_FILES
    enough = hard == resource.RLIM_INFINITY or hard >= _FEW_FILES
    hint = f"ulimit -n {_FEW_FILES}" + ("" if enough else ", which needs a higher hard limit (limits.conf)")
    yield warning(f"{text}: few for many ranks with data workers", hint) if few else good(text)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = f"locked memory: {'unlimited' if locked == resource.RLIM_INFINITY else mebibytes(locked)}"
    if Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        yield warning(f"{text}, and InfiniBand needs it unlimited", "ulimit -l unlimited (limits.conf, or Slurm's)")
    else:
        yield good(text)
    yield _cores()
    if sums_overflow():
        hint = "--qat.engine x86 for int8 models that run on CPUs like this one"
        yield warning(f"int8 in ONNX Runtime and OpenVINO: {WITHOUT_VNNI}", hint)


def _cores() -> Line:
    everywhere, usable, quota = os.cpu_count() or 1, len(os.sched_getaffinity(0)), cgroup_cores(_CGROUP)
    text = f"cores: {everywhere}, {usable} usable by this process"
    if quota is not None:
        text += f", {quota:g} by its cgroup's quota"
    if quota is not None and quota < usable:
        hint = f"--run.threads_per_rank {max(1, int(quota))} for one rank, and fewer for more"
        return warning(f"{text}: threads beyond the quota are throttled", hint)
    return good(text)


def cgroup_cores(root: Path) -> float | None:
    """Returns the CPU quota of a container in cores, from cgroup version 2 or 1; None without a quota."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return int(quota) / int(period) if quota.isdecimal() and int(period) > 0 else None


def _limit(value: int) -> str:
    return "any number" if value == resource.RLIM_INFINITY else str(value)
