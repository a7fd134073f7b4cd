"""Checks of the options of `dist-train launch`, before anything is started."""

from __future__ import annotations

import sys
from pathlib import Path

from dist_train.addresses import is_address
from dist_train.cluster.interfaces import interface_of, interfaces
from dist_train.errors import SetupError, UsageError
from dist_train.launchers.job import Job

_KUBERNETES = "--image IMAGE, with dist_train in it; --claim NAME, the claim of a volume that all pods may write"


def option_text(path: Path) -> str:
    """Returns the path as an option's value that reads back as the same path, whatever it begins with."""
    text = str(path)
    return f"./{text}" if text == "null" or text[:1] in ("-", "'", '"') else text


def interface(address: str, dry_run: bool) -> str:
    """Returns the interface by which this node's ranks reach the others; "" where no interface has the address.

    Raises:
        SetupError: no other machine could reach this one at the address.
    """
    try:
        return interface_of(address) or ""
    except OSError as error:
        if dry_run:  # for another node, perhaps
            print(f"dist-train: on a node that has {address}, GLOO_SOCKET_IFNAME is set too", file=sys.stderr)
            return ""
        reason = error.strerror or str(error)
        here = [f"{each.addresses[0]} ({each.name})" for each in interfaces() if each.reaches_others]
        raise SetupError(
            f"--local-addr is {address}, at which this machine cannot listen: {reason}",
            f"--local-addr ADDR, one of this machine's own: {', '.join(here) or 'it has none that others reach'}",
        ) from None


def check(launcher: str, job: Job) -> None:
    """Checks a launcher's options against each other.

    Raises:
        UsageError: they contradict each other, or some are missing.
    """
    least, most = job.nodes
    for name, value in job.sbatch:
        if "\n" in value:
            raise UsageError(f"--sbatch.{name} has a line break", "a line of #SBATCH has no place for one")
    if is_address(job.run_dir) and any(name == "array" for name, _ in job.sbatch):
        raise UsageError(f"the tasks of an array cannot share one address, {job.run_dir}", "--run.dir DIR, a folder")
    if job.task_per_rank and job.restarts:
        raise UsageError("--restarts is for torchrun's agents, and --task-per-rank has none", "leave one of them out")
    if launcher == "accelerate" and least != most:
        raise UsageError("accelerate starts on a fixed number of nodes", f"--nodes {most}")
    if launcher == "kubernetes":
        # One pod whose run is at a store shares nothing.
        alone = is_address(job.run_dir) and most == 1
        pods = {"--image": job.image} | ({} if alone else {"--claim": job.claim})
        missing = [name for name, value in pods.items() if not value]
        if missing:
            raise UsageError(f"kubernetes needs {' and '.join(missing)}", _KUBERNETES)
        return
    if launcher != "slurm" and most > 1:
        needed = ["--endpoint"] + (["--node-rank"] if launcher == "accelerate" else [])
        given = {"--endpoint": job.endpoint, "--node-rank": job.node_rank}
        missing = [name for name in needed if given[name] in ("", None)]
        if missing:
            rank = " --node-rank K" if launcher == "accelerate" else ""
            hint = f"on every node: --endpoint HOST{rank}, where HOST is the first node"
            raise UsageError(f"several nodes need {' and '.join(missing)}", hint)
