"""Variables that MPI's launchers (mpirun, mpiexec, jsrun) give to each rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dist_train.errors import Problem


@dataclass(frozen=True)
class MpiNames:
    """Names of one launcher's variables.

    Attributes:
        passing: the option that passes a variable to all ranks, ready for `format(name=..., value=...)`.
        job: names of variables that identify the job, the same for all its ranks.
    """

    launcher: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str
    passing: str
    job: tuple[str, ...] = ()

    def all(self) -> tuple[str, ...]:
        return self.rank, self.world_size, self.local_rank, self.local_world_size

    def job_of(self, environ: Mapping[str, str]) -> str:
        """Returns what identifies the job; "" if no variable does."""
        return next((environ[name] for name in self.job if environ.get(name)), "")


_KNOWN = (
    MpiNames(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "-x {name}={value}",
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    MpiNames(
        "MVAPICH's mpirun",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        "-genv {name} {value}",
    ),
    MpiNames(
        "jsrun",
        "JSM_NAMESPACE_RANK",
        "JSM_NAMESPACE_SIZE",
        "JSM_NAMESPACE_LOCAL_RANK",
        "JSM_NAMESPACE_LOCAL_SIZE",
        "-E {name}={value}",
    ),
    # MPICH's and Intel's launchers. Slurm sets PMI_RANK and PMI_SIZE, too (srun --mpi=pmi2).
    MpiNames("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "-genv {name} {value}"),
)
_ALONE = ("PMIX_RANK", "PALS_RANKID")  # set by further launchers, which give no number of ranks


def mpi_names(environ: Mapping[str, str]) -> MpiNames | None:
    """Returns the names of the MPI launcher that started this process as one of several ranks; else None.

    A step of Slurm whose tasks have the same numbers in PMI's variables is Slurm's.
    """
    for names in _KNOWN:
        if names.rank not in environ and names.world_size not in environ:
            continue
        if environ.get(names.world_size) == "1":
            return None
        here = environ.get(names.rank), environ.get(names.world_size)
        tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS")
        return None if here == (environ.get("SLURM_PROCID"), tasks) else names
    return None


def lone_rank_problems(environ: Mapping[str, str]) -> Iterator[Problem]:
    """Yields a problem if a launcher other than Slurm numbered this process, and none says how many there are.

    Without it each of N processes would train alone, all in one run directory.
    """
    for name in _ALONE:
        known = any(each.world_size in environ for each in _KNOWN)
        # Slurm numbers the shells of salloc and sbatch, too: with PMIx as its default, in PMIX_RANK.
        if name in environ and not known and environ[name] != environ.get("SLURM_PROCID"):
            message = f"is {environ[name]}, so a launcher started several processes, but WORLD_SIZE is not set"
            hint = (
                f"set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each process, "
                f"or start with torchrun; for one process unset {name}"
            )
            yield Problem(name, message, "environment", hint)
