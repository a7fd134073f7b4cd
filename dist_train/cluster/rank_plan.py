"""The rank of this process, read from torchrun's variables, else from a Slurm step's; else it is the only process.

SLURM_JOB_ID alone proves nothing: the shell of a batch job has it too, and is no rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from dist_train.cluster.ports import candidates, ephemeral_range, is_free
from dist_train.cluster.slurm_lists import parse_hostlist, parse_tasks_per_node
from dist_train.errors import EXIT_DONE, EXIT_PREEMPTED, Problem, SetupError

# Set by `dist-train launch`:
ASKED = "DIST_TRAIN_NUM_PROCESSES"  # the number of processes asked for, N or MIN:MAX
EXIT_FILE = "DIST_TRAIN_EXIT_FILE"  # a rank that exits with 78 makes this file, as agents turn 78 into 1
_SPECIAL_STEPS = 0xFFFFFFF0  # Slurm's slurm.h: batch, interactive and extern steps have numbers above
_TORCHRUN = "torchrun --nproc_per_node N -m dist_train run CONFIG"
_SRUN = "start ranks with srun, one task each, and let it set SLURM_*"

Source = Literal["torchrun", "slurm", "single"]


@dataclass(frozen=True)
class RankPlan:
    """The place of this process among the ranks.

    Attributes:
        source: the launcher whose variables count; "torchrun" stands for all that set RANK and WORLD_SIZE.
        master_addr, master_port: address and port of the ranks' store; "" and 0 for one process.
    """

    source: Source = "single"
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    master_addr: str = ""
    master_port: int = 0

    def variables(self) -> dict[str, str]:
        """Returns torchrun's variables for a Slurm task, as libraries know only these; {} where they are set."""
        if self.source != "slurm" or self.world_size == 1:
            return {}
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }

    def require_free_port(self) -> None:
        """Checks, on the rank that will listen, the port that was derived from the Slurm step.

        Raises:
            SetupError: the port is taken.
        """
        if self.source == "slurm" and self.rank == 0 and self.world_size > 1 and not is_free(self.master_port):
            raise self.port_taken()

    def port_taken(self) -> SetupError:
        """Returns the error for a port at which another program listens."""
        if self.source == "slurm":
            hint = "start the step again (each step has another port), or choose one: MASTER_PORT"
        else:
            look = f"ss -tlnp 'sport = {self.master_port}'"
            hint = f"another MASTER_PORT, the same for all ranks; what listens there: {look}"
        where = f"MASTER_PORT {self.master_port} on {self.master_addr}"
        return SetupError(f"{where}, where the ranks would meet, is taken", hint)


def detect(environ: Mapping[str, str], expand: Callable[[str], list[str]] = parse_hostlist) -> RankPlan:
    """Returns the plan that `environ` gives. `expand` turns a Slurm host list into hosts.

    Raises:
        SetupError: the variables contradict each other, or address or port is missing.
    """
    problems = rank_problems(environ)
    if problems:
        said = "; ".join(f"{problem.place} {problem.message}" for problem in problems)
        raise SetupError(f"the environment contradicts itself: {said}", problems[0].hint)
    plan = _plan(environ)
    if plan.world_size == 1:
        return plan
    address, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    if plan.source == "slurm":
        address = address or expand(environ["SLURM_STEP_NODELIST"])[0]
        port = port or str(step_port(environ))
    missing = [name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not value]
    if missing:
        raise SetupError(
            f"WORLD_SIZE is {plan.world_size}, but {', '.join(missing)} is not set",
            f"start with {_TORCHRUN}, or unset WORLD_SIZE",
        )
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise SetupError(f"MASTER_PORT is {port!r}, not a port", "unset it, or give a number from 1024 to 65535")
    return RankPlan(plan.source, plan.rank, plan.local_rank, plan.world_size, plan.local_world_size, address, int(port))


def step_port(environ: Mapping[str, str]) -> int:
    """Returns the port of a Slurm step: the same on all its tasks, another one for another step."""
    key = f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"
    return next(islice(candidates(key, ephemeral_range()), 1))


def source_of(environ: Mapping[str, str]) -> Source:
    """Returns the launcher whose variables count."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return "torchrun"
    step = environ.get("SLURM_STEP_ID", "")
    tasks = "SLURM_STEP_NUM_TASKS" in environ or "SLURM_NTASKS" in environ
    if step.isdecimal() and int(step) < _SPECIAL_STEPS and "SLURM_PROCID" in environ and tasks:
        return "slurm"
    return "single"


def rank_problems(environ: Mapping[str, str]) -> list[Problem]:
    """Returns every contradiction among the launcher's variables, and with the number of processes asked for."""
    find = {"torchrun": _torchrun_problems, "slurm": _slurm_problems, "single": _accelerate_problems}
    problems = list(find[source_of(environ)](environ))
    return problems or list(_asked_problems(environ, _plan(environ).world_size))


def _plan(environ: Mapping[str, str]) -> RankPlan:
    """Returns the plan of variables that were checked, without address and port."""
    source = source_of(environ)
    if source == "torchrun":
        rank, world_size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
        local_rank, local_size = environ.get("LOCAL_RANK", rank), environ.get("LOCAL_WORLD_SIZE", world_size)
        return RankPlan(source, rank, int(local_rank), world_size, int(local_size))
    if source == "slurm":
        world_size = int(environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"])
        if world_size == 1:
            return RankPlan(source)
        local_size = parse_tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
        return RankPlan(source, int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"]), world_size, local_size)
    return RankPlan()


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


def _torchrun_problems(environ: Mapping[str, str]) -> Iterator[Problem]:
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


def _slurm_problems(environ: Mapping[str, str]) -> Iterator[Problem]:
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


def _accelerate_problems(environ: Mapping[str, str]) -> Iterator[Problem]:
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


def _asked_problems(environ: Mapping[str, str], world_size: int) -> Iterator[Problem]:
    text = environ.get(ASKED)
    if text is None:
        return
    least, _, most = text.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal()):
        yield Problem(ASKED, f"must be N or MIN:MAX, not {text!r}", "environment", f"unset {ASKED}")
    elif not int(least) <= world_size <= int(most or least):
        message = f"is {text}, the number of processes asked for, but the launcher started {world_size}"
        hint = f"look at the launcher's own settings (dist-train launch --dry-run shows the command), or unset {ASKED}"
        yield Problem(ASKED, message, "environment", hint)


def exit_code_when_preempted(environ: Mapping[str, str]) -> int:
    """Returns 75; 0 under torchrun's agent, which would restart a worker that ends with another code."""
    return EXIT_DONE if "TORCHELASTIC_RUN_ID" in environ else EXIT_PREEMPTED
