"""Checks the ranks that this environment gives: the plan, its variables, and their contradictions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from dist_train.cluster.interfaces import is_loopback, resolve
from dist_train.cluster.mpi import mpi_names
from dist_train.cluster.ports import is_free
from dist_train.cluster.rank_plan import ASKED, RankPlan, detect, rank_problems, source_of
from dist_train.cluster.slurm_lists import show_hostnames
from dist_train.distributed.preflight import hosts_store
from dist_train.doctor.base import Line, Subject, bad, good, warning
from dist_train.errors import EXIT_CONFIG, SetupError

# Only these are printed, as an environment holds secrets.
_DECISIVE = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "slurm": (
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_NTASKS",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_STEP_NODELIST",
        "MASTER_ADDR",
        "MASTER_PORT",
    ),
    "mpi": ("MASTER_ADDR", "MASTER_PORT"),
    "single": (),
}


def check(subject: Subject) -> Iterator[Line]:
    environ = os.environ
    source = source_of(environ)
    problems = rank_problems(environ)
    for problem in problems:
        yield bad(f"{problem.place} {problem.message}", problem.hint, EXIT_CONFIG)
    yield from _decisive(environ, source)
    if problems:
        return
    try:
        plan = detect(environ, show_hostnames)
    except SetupError as error:
        yield bad(error.message, error.hint, EXIT_CONFIG)
        return
    yield good(_told(plan))
    if plan.world_size > 1:
        yield from _meeting_place(plan, environ)


def _decisive(environ: Mapping[str, str], source: str) -> Iterator[Line]:
    mpi = mpi_names(environ) if source == "mpi" else None
    names = (*(mpi.all() if mpi else ()), *_DECISIVE[source], ASKED)
    found = [f"{name}={environ[name]}" for name in names if name in environ]
    if found:
        yield good(f"decided by {', '.join(found)}")
    if source == "single" and "SLURM_JOB_ID" in environ:
        yield good("SLURM_JOB_ID is set, but this shell is no rank: srun starts ranks")
    if source == "torchrun" and "SLURM_PROCID" in environ:
        yield good("the variables of Slurm's step are not used: RANK and WORLD_SIZE come first")


def _told(plan: RankPlan) -> str:
    if plan.world_size == 1:
        return "one process: no launcher's variables are set" if plan.source == "single" else "one process"
    nodes = -(-plan.world_size // plan.local_world_size)
    where = "one node" if nodes == 1 else f"{nodes} nodes"
    return (
        f"rank {plan.rank} of {plan.world_size}, local rank {plan.local_rank} of {plan.local_world_size}, on {where}; "
        f"they meet at {plan.master_addr}:{plan.master_port}"
    )


def _meeting_place(plan: RankPlan, environ: Mapping[str, str]) -> Iterator[Line]:
    try:
        addresses = resolve(plan.master_addr)
    except OSError as error:
        text = f"MASTER_ADDR {plan.master_addr} does not resolve: {error.strerror}"
        yield bad(text, "give rank 0's IP address, or a name that every node knows", EXIT_CONFIG)
        return
    yield good(f"MASTER_ADDR resolves to {', '.join(addresses)}")
    if plan.world_size > plan.local_world_size and all(is_loopback(address) for address in addresses):
        text = "MASTER_ADDR is a loopback address, and there are several nodes: each would look for rank 0 on itself"
        yield warning(text, "MASTER_ADDR: the address of rank 0's node (nothing to do where all are this machine)")
    if hosts_store(plan, environ) and not is_free(plan.master_port):
        taken = plan.port_taken()
        yield bad(taken.message, taken.hint, EXIT_CONFIG)
