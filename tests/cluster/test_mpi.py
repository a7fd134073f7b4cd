"""Ranks read from the variables of MPI's launchers (those of Open MPI 4.1.4 as mpirun set them)."""

from __future__ import annotations

import pytest

from dist_train.cluster.rank_plan import RankPlan, detect, rank_problems, source_of
from dist_train.errors import EXIT_CONFIG, SetupError


def open_mpi(rank: int, local_rank: int, size: int = 4, local_size: int = 2, job: str = "1416101889") -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
        "PMIX_NAMESPACE": job,
        "PMIX_RANK": str(rank),
    }


def hydra(rank: int, size: int = 2) -> dict[str, str]:
    return {
        "PMI_RANK": str(rank),
        "PMI_SIZE": str(size),
        "MPI_LOCALRANKID": str(rank),
        "MPI_LOCALNRANKS": str(size),
        "PMI_FD": "9",
    }


def test_ranks_of_one_node_meet_at_a_port_of_their_job() -> None:
    plans = [detect(open_mpi(rank, rank, 2)) for rank in range(2)]
    assert [(plan.rank, plan.local_rank, plan.world_size, plan.local_world_size) for plan in plans] == [
        (0, 0, 2, 2),
        (1, 1, 2, 2),
    ]
    assert {(plan.source, plan.master_addr, plan.master_port) for plan in plans} == {
        ("mpi", "127.0.0.1", plans[0].master_port)
    }
    assert detect(open_mpi(0, 0, 2, job="1")).master_port != plans[0].master_port
    assert plans[1].variables() == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(plans[0].master_port),
    }


@pytest.mark.parametrize(
    ("environ", "missing", "option"),
    [
        (open_mpi(2, 0), "MASTER_ADDR, where they meet", "-x MASTER_ADDR="),
        (hydra(1), "MASTER_PORT, where they meet", "-genv MASTER_PORT 29500"),
    ],
)
def test_where_they_cannot_know_where_to_meet_no_rank_waits(environ: dict[str, str], missing: str, option: str) -> None:
    with pytest.raises(SetupError, match=missing) as caught:
        detect(environ)
    assert option in caught.value.hint and caught.value.exit_code == EXIT_CONFIG
    told = {**environ, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}
    assert (detect(told).master_addr, detect(told).master_port) == ("10.0.0.7", 1234)


SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "n1",
}


SHELL = {**SRUN, "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # of salloc


@pytest.mark.parametrize(
    ("environ", "source"),
    [
        ({**open_mpi(1, 1), "RANK": "0", "WORLD_SIZE": "1"}, "torchrun"),  # an agent on each of mpirun's ranks
        ({**SRUN, "PMI_RANK": "1", "PMI_SIZE": "2", "PMIX_RANK": "1"}, "slurm"),  # srun --mpi=pmi2
        ({**SRUN, "SLURM_PROCID": "0", **open_mpi(3, 1)}, "mpi"),  # its daemons are tasks of srun
        (open_mpi(0, 0, 1, 1), "single"),
        ({**SRUN, "PMIX_RANK": "1"}, "slurm"),
        ({**SHELL, "PMIX_RANK": "0"}, "single"),
    ],
)
def test_the_launcher_nearest_to_the_rank_counts(environ: dict[str, str], source: str) -> None:
    assert source_of(environ) == source and not rank_problems(environ)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"PMIX_RANK": "1", "PMIX_NAMESPACE": "x"}, "PMIX_RANK is 1, so a launcher started several processes"),
        ({"PALS_RANKID": "0"}, "PALS_RANKID is 0"),
        ({**SHELL, "PMIX_RANK": "1"}, "PMIX_RANK is 1"),  # another launcher, in the shell of a job
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MPI_LOCALRANKID and MPI_LOCALNRANKS is not set"),
        ({**hydra(1), "PMI_RANK": "2"}, "PMI_RANK is 2, but PMI_SIZE is 2"),
        ({**open_mpi(0, 0), "OMPI_COMM_WORLD_SIZE": "many"}, "must be a whole number, at least 1, not 'many'"),
    ],
)
def test_many_processes_never_train_alone_in_one_folder(environ: dict[str, str], said: str) -> None:
    assert rank_problems(environ)
    with pytest.raises(SetupError, match=said.replace("(", "[(]")) as caught:
        detect(environ)
    assert caught.value.exit_code == EXIT_CONFIG


def test_an_mpi_rank_that_is_alone_is_one_process() -> None:
    assert detect(open_mpi(0, 0, 1, 1)) == RankPlan()
