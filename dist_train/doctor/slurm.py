"""Checks Slurm, where its programs are installed: the version and the partitions."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from dist_train.doctor.base import Line, Subject, good, warning

_SECONDS = 10.0


def check(subject: Subject) -> Iterator[Line]:
    if shutil.which("sinfo") is None:
        yield good("Slurm's programs are not here: dist-train launch slurm prints a script to submit elsewhere")
        return
    try:
        told, answer = _ask("--version"), _ask("--noheader", "--format=%P %a %D %c %l")
    except subprocess.TimeoutExpired:
        yield warning(f"Slurm's controller did not answer within {_SECONDS:g} s", "scontrol ping")
        return
    if told.returncode == 0:
        yield good(told.stdout.strip())
    if answer.returncode != 0:
        complaint = (answer.stderr.strip().splitlines() or ["sinfo failed"])[-1]
        yield warning(f"Slurm's programs are here, but no cluster answers: {complaint}", "scontrol ping; SLURM_CONF")
        return
    for row in answer.stdout.splitlines():
        name, state, nodes, cpus, limit = row.split()
        star = name.removesuffix("*")
        default = ", the default" if star != name else ""
        yield good(f"partition {star}{default}: {state}, {nodes} nodes of {cpus} CPUs, at most {limit}")


def _ask(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sinfo", *options], capture_output=True, text=True, timeout=_SECONDS, check=False)
