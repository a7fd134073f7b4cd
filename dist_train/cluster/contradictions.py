"""Contradictions among the variables that a launcher gives to a rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dist_train.cluster.mpi import lone_rank_problems, mpi_names
from dist_train.cluster.slurm_lists import parse_hostlist, parse_tasks_per_node
from dist_train.errors import Problem

_SRUN = "start ranks with srun, one task each, and let it set SLURM_*"


def _numbers(environ: Mapping[str, str], leasts: Mapping[str, int], hint: str) -> tuple[dict[str, int], list[Problem]]:
    """Returns the variables that are whole numbers of at least `leasts`, and the mistakes of the others."""
    numbers, problems = {}, []
    for name, least in leasts.items():
        text = environ.get(name, "")
        if text.isascii() and text.isdecimal() and int(text) >= least:
            numbers[name] = int(text)
        elif name in environ:
            message = f"must be a whole number, at least {least}, not {text!r}"
            problems.append(Problem(name, message, "environment", hint))
    return numbers, problems


def _below(numbers: Mapping[str, int], rank: str, size: str, hint: str) -> Iterator[Problem]:
    if rank in numbers and numbers[rank] >= numbers.get(size, numbers[rank] + 1):
        message = f"is {numbers[rank]}, but {size} is {numbers[size]}: ranks are counted from 0"
        yield Problem(rank, message, "environment", hint)


def torchrun_problems(environ: Mapping[str, str]) -> Iterator[Problem]:
    hint = "start ranks with torchrun, which sets RANK, WORLD_SIZE, LOCAL_RANK; or unset these for one process"
    leasts = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    numbers, problems = _numbers(environ, leasts, hint)
    yield from problems
    yield from _below(numbers, "RANK", "WORLD_SIZE", hint)
    yield from _below(
        numbers, "LOCAL_RANK", "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environ else "WORLD_SIZE", hint
    )
    if numbers.get("LOCAL_WORLD_SIZE", 1) > numbers.get("WORLD_SIZE", numbers.get("LOCAL_WORLD_SIZE", 1)):
        message = f"is {numbers['LOCAL_WORLD_SIZE']}, more than WORLD_SIZE, {numbers['WORLD_SIZE']}"
        yield Problem("LOCAL_WORLD_SIZE", message, "environment", hint)
    if "RANK" in environ and "WORLD_SIZE" not in environ:
        yield Problem("RANK", "is set, but WORLD_SIZE is not", "environment", hint)
    if "RANK" not in environ and numbers.get("WORLD_SIZE", 1) > 1:
        yield Problem("WORLD_SIZE", f"is {numbers['WORLD_SIZE']}, but RANK is not set", "environment", hint)


def slurm_problems(environ: Mapping[str, str]) -> Iterator[Problem]:
    leasts = {"SLURM_STEP_NUM_TASKS": 1, "SLURM_NTASKS": 1, "SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NODEID": 0}
    numbers, problems = _numbers(environ, leasts, _SRUN)
    yield from problems
    if problems:
        return
    sizes = {name: numbers[name] for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in numbers}
    if len(set(sizes.values())) > 1:
        first, second = sizes
        yield Problem(first, f"is {sizes[first]}, but {second} is {sizes[second]}", "environment", _SRUN)
        return
    name, size = next(iter(sizes.items()))
    if numbers["SLURM_PROCID"] >= size:
        yield from _below(numbers, "SLURM_PROCID", name, _SRUN)
        return
    if size == 1:
        return
    needed = ("SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
    missing = [name for name in needed if name not in environ]
    if missing:
        yield Problem(name, f"is {size}, but {', '.join(missing)} is not set", "environment", _SRUN)
        return
    yield from _layout_problems(environ, numbers, name, size)


def _layout_problems(
    environ: Mapping[str, str], numbers: Mapping[str, int], size_name: str, size: int
) -> Iterator[Problem]:
    """Checks that a step's tasks are numbered node by node: local ranks and shares of data rest on it."""
    text = environ["SLURM_STEP_TASKS_PER_NODE"]
    try:
        tasks, hosts = parse_tasks_per_node(text), parse_hostlist(environ["SLURM_STEP_NODELIST"])
    except ValueError as error:
        yield Problem("SLURM_STEP_TASKS_PER_NODE", f"or SLURM_STEP_NODELIST: {error}", "environment", _SRUN)
        return
    rank, local_rank, node = (numbers[f"SLURM_{name}"] for name in ("PROCID", "LOCALID", "NODEID"))
    if sum(tasks) != size:
        message = f"is {text}, {sum(tasks)} tasks, but {size_name} is {size}"
        yield Problem("SLURM_STEP_TASKS_PER_NODE", message, "environment", _SRUN)
    elif len(hosts) != len(tasks):
        message = f"is {environ['SLURM_STEP_NODELIST']}, {len(hosts)} nodes, but SLURM_STEP_TASKS_PER_NODE is {text}"
        yield Problem("SLURM_STEP_NODELIST", message, "environment", _SRUN)
    elif node >= len(tasks) or local_rank >= tasks[node]:
        name = "SLURM_NODEID" if node >= len(tasks) else "SLURM_LOCALID"
        message = f"is {environ[name]}, but SLURM_STEP_TASKS_PER_NODE is {text}"
        yield Problem(name, message, "environment", _SRUN)
    else:
        first = sum(tasks[:node])
        here = ",".join(str(one) for one in range(first, first + tasks[node]))
        if rank != first + local_rank or environ.get("SLURM_GTIDS", here) != here:
            message = f"is {rank}, but with ranks numbered node by node, node {node} has {here}"
            yield Problem("SLURM_PROCID", message, "environment", "srun --distribution=block")


def mpi_problems(environ: Mapping[str, str]) -> Iterator[Problem]:
    names = mpi_names(environ)
    assert names is not None
    hint = f"start ranks with {names.launcher}, or with torchrun; for one process unset {' and '.join(names.all()[:2])}"
    numbers, problems = _numbers(environ, dict(zip(names.all(), (0, 1, 0, 1), strict=True)), hint)
    yield from problems
    missing = [name for name in names.all() if name not in environ]
    if missing:
        present = next(name for name in names.all() if name in environ)
        message = f"is {environ[present]}, but {' and '.join(missing)} is not set"
        more = "set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE in each process yourself, or "
        yield Problem(present, message, "environment", more + hint)
    yield from _below(numbers, names.rank, names.world_size, hint)
    yield from _below(numbers, names.local_rank, names.local_world_size, hint)


def single_problems(environ: Mapping[str, str]) -> Iterator[Problem]:
    yield from lone_rank_problems(environ)
    # accelerate sets MASTER_PORT for several processes, even where it then starts one (1.15, utils/launch.py).
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ:
        message = (
            "is not set, but MASTER_PORT is: accelerate was asked for several processes and started this one alone"
        )
        hint = (
            "on CPUs it starts several only with distributed_type: MULTI_GPU and use_cpu: true in its config file: "
            "dist-train launch accelerate --nproc-per-node N CONFIG; for one process unset MASTER_PORT"
        )
        yield Problem("WORLD_SIZE", message, "environment", hint)
