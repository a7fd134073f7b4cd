"""The rank of this process, read from torchrun's variables, else from MPI's or a Slurm step's; else it is the only one.

SLURM_JOB_ID alone proves nothing: the shell of a batch job has it too, and is no rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from dist_train.cluster.contradictions import mpi_problems, single_problems, slurm_problems, torchrun_problems
from dist_train.cluster.mpi import mpi_names
from dist_train.cluster.ports import candidates, ephemeral_range, is_free
from dist_train.cluster.slurm_lists import parse_hostlist, parse_tasks_per_node
from dist_train.errors import EXIT_DONE, EXIT_PREEMPTED, Problem, SetupError

# Set by `dist-train launch`:
ASKED = "DIST_TRAIN_NUM_PROCESSES"  # the number of processes asked for, N or MIN:MAX
EXIT_FILE = "DIST_TRAIN_EXIT_FILE"  # a rank that exits with 78 makes this file, as agents turn 78 into 1
_SPECIAL_STEPS = 0xFFFFFFF0  # Slurm's slurm.h: batch, interactive and extern steps have numbers above
_TORCHRUN = "torchrun --nproc_per_node N -m dist_train run CONFIG"

Source = Literal["torchrun", "slurm", "mpi", "single"]


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
        """Returns torchrun's variables for a rank of Slurm or MPI, which libraries look for; {} where they are set."""
        if self.source not in ("slurm", "mpi") or self.world_size == 1:
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
        """Checks, on the rank that will listen, the port that may have been derived from a job's number.

        Raises:
            SetupError: the port is taken.
        """
        if self.source in ("slurm", "mpi") and self.rank == 0 and self.world_size > 1 and not is_free(self.master_port):
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
    plan = place_of(environ)
    if plan.world_size == 1:
        return plan
    address, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    if plan.source == "slurm":
        address = address or expand(environ["SLURM_STEP_NODELIST"])[0]
        port = port or str(step_port(environ))
    mpi = mpi_names(environ) if plan.source == "mpi" else None
    if mpi is not None:
        if plan.world_size == plan.local_world_size:
            address = address or "127.0.0.1"
        if job := mpi.job_of(environ):
            port = port or str(_port_of(job))
    missing = [name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not value]
    if missing and mpi is not None:
        values = {"MASTER_ADDR": "RANK_0S_NODE", "MASTER_PORT": "29500"}
        options = " ".join(mpi.passing.format(name=name, value=values[name]) for name in missing)
        raise SetupError(
            f"{mpi.launcher} started {plan.world_size} ranks, but {' and '.join(missing)}, where they meet, is not set",
            f"mpirun {options} ...",
        )
    if missing:
        raise SetupError(
            f"WORLD_SIZE is {plan.world_size}, but {', '.join(missing)} is not set",
            f"start with {_TORCHRUN}, or unset WORLD_SIZE",
        )
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise SetupError(f"MASTER_PORT is {port!r}, not a port", "unset it, or give a number from 1024 to 65535")
    return RankPlan(plan.source, plan.rank, plan.local_rank, plan.world_size, plan.local_world_size, address, int(port))


def place_of(environ: Mapping[str, str]) -> RankPlan:
    """Returns the plan that `environ` gives, without address and port.

    Raises:
        SetupError: the variables contradict each other.
    """
    problems = rank_problems(environ)
    if problems:
        said = "; ".join(f"{problem.place} {problem.message}" for problem in problems)
        raise SetupError(f"the environment contradicts itself: {said}", problems[0].hint)
    return _plan(environ)


def step_port(environ: Mapping[str, str]) -> int:
    """Returns the port of a Slurm step: the same on all its tasks, another one for another step."""
    return _port_of(f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}")


def _port_of(key: str) -> int:
    return next(islice(candidates(key, ephemeral_range()), 1))


def source_of(environ: Mapping[str, str]) -> Source:
    """Returns the launcher whose variables count."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return "torchrun"
    if mpi_names(environ) is not None:  # before Slurm: mpirun starts its daemons by srun, whose variables ranks inherit
        return "mpi"
    step = environ.get("SLURM_STEP_ID", "")
    tasks = "SLURM_STEP_NUM_TASKS" in environ or "SLURM_NTASKS" in environ
    if step.isdecimal() and int(step) < _SPECIAL_STEPS and "SLURM_PROCID" in environ and tasks:
        return "slurm"
    return "single"


def rank_problems(environ: Mapping[str, str]) -> list[Problem]:
    """Returns every contradiction among the launcher's variables, and with the number of processes asked for."""
    find = {
        "torchrun": torchrun_problems,
        "slurm": slurm_problems,
        "mpi": mpi_problems,
        "single": single_problems,
    }
    problems = list(find[source_of(environ)](environ))
    return problems or list(_asked_problems(environ, _plan(environ).world_size))


def _plan(environ: Mapping[str, str]) -> RankPlan:
    """Returns the plan of variables that were checked, without address and port."""
    source = source_of(environ)
    if source == "torchrun":
        rank, world_size = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
        local_rank, local_size = environ.get("LOCAL_RANK", rank), environ.get("LOCAL_WORLD_SIZE", world_size)
        return RankPlan(source, rank, int(local_rank), world_size, int(local_size))
    if source == "mpi":
        names = mpi_names(environ)
        assert names is not None
        rank, world_size, local_rank, local_size = (int(environ[name]) for name in names.all())
        return RankPlan(source, rank, local_rank, world_size, local_size)
    if source == "slurm":
        world_size = int(environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"])
        if world_size == 1:
            return RankPlan(source)
        local_size = parse_tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
        return RankPlan(source, int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"]), world_size, local_size)
    return RankPlan()


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
