"""Submits a script to sbatch, and shows a job's output until the job has ended."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import TextIO

from dist_train.errors import EXIT_FAILED, SetupError

_POLL_SECONDS = 1.0
_ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)


def submit(script: str) -> str:
    """Gives the script to sbatch; returns the job's number.

    Raises:
        SetupError: there is no sbatch, or it refused; with sbatch's message.
    """
    if shutil.which("sbatch") is None:
        raise SetupError("there is no sbatch here", "submit where Slurm is, or save the script: launch slurm --dry-run")
    answer = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        said = answer.stderr.strip().removeprefix("sbatch: ")
        raise SetupError(f"sbatch refused the job: {said}", "--sbatch.KEY VALUE changes an option; --dry-run shows all")
    return answer.stdout.strip().partition(";")[0]


def follow(number: str, out: TextIO) -> int:
    """Copies the job's output to `out`, through requeues, until the job has ended; returns its exit code.

    Raises:
        SetupError: Slurm does not know the job.
    """
    position, path, job = 0, None, _show(number)
    if job is None:
        raise SetupError(f"Slurm does not know job {number}", "squeue --me")
    while job is not None:
        ended = job["JobState"] in _ENDED  # asked before the last look at the output
        path = Path(job["StdOut"])
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace", newline="") as file:
                file.seek(position)
                out.write(file.read())
                out.flush()
                position = file.tell()
        if ended:
            code, _, killed = job["ExitCode"].partition(":")
            return int(code) or (EXIT_FAILED if killed != "0" or job["JobState"] != "COMPLETED" else 0)
        time.sleep(_POLL_SECONDS)
        job = _show(number)
    return EXIT_FAILED


def _show(number: str) -> dict[str, str] | None:
    """Returns state, output file and exit code from `scontrol show job`; None for a job that Slurm has forgotten."""
    answer = subprocess.run(
        ["scontrol", "show", "job", number], capture_output=True, text=True, timeout=60, check=False
    )
    if answer.returncode != 0:
        return None
    found = dict(re.findall(r"(?:^|\s)(JobState|ExitCode)=(\S+)", answer.stdout))
    return found | dict(re.findall(r"^\s*(StdOut)=(.*)$", answer.stdout, re.MULTILINE))  # a path may have spaces
