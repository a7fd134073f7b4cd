"""Ranks read from environments captured from real launchers (Slurm 22.05.8, torch 2.14.1, accelerate 1.15.0)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_train.cluster.rank_plan import RankPlan, detect, rank_problems, source_of
from dist_train.errors import EXIT_CONFIG, SetupError

CAPTURED: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "launchers" / "environments.json").read_text())


def captured(launcher: str) -> list[dict[str, str]]:
    """The environments of all its processes, in the order of their ranks."""
    found = [entry["environ"] for entry in CAPTURED if entry["launcher"] == launcher]
    assert found
    return found


def numbers(plan: RankPlan) -> tuple[int, int, int, int]:
    return plan.rank, plan.local_rank, plan.world_size, plan.local_world_size


@pytest.mark.parametrize(
    ("launcher", "source", "expected"),
    [
        ("torchrun", "torchrun", [(0, 0, 2, 2), (1, 1, 2, 2)]),
        ("accelerate_multigpu", "torchrun", [(0, 0, 2, 2), (1, 1, 2, 2)]),
        ("accelerate_one", "single", [(0, 0, 1, 1)]),
        ("srun1", "slurm", [(0, 0, 1, 1)]),
        ("srun3", "slurm", [(0, 0, 3, 2), (1, 1, 3, 2), (2, 0, 3, 1)]),
        ("srun_in_sbatch", "slurm", [(0, 0, 4, 2), (1, 1, 4, 2), (2, 0, 4, 2), (3, 1, 4, 2)]),
        ("srun_fewer_in_sbatch", "slurm", [(0, 0, 2, 1), (1, 0, 2, 1)]),
        ("torchrun_in_srun", "torchrun", [(0, 0, 4, 2), (1, 1, 4, 2), (2, 0, 4, 2), (3, 1, 4, 2)]),
        ("batchshell", "single", [(0, 0, 1, 1)]),
        ("salloc", "single", [(0, 0, 1, 1)]),
    ],
)
def test_the_plan_is_the_launcher_s(launcher: str, source: str, expected: list[tuple[int, int, int, int]]) -> None:
    plans = [detect(environ) for environ in captured(launcher)]
    assert [numbers(plan) for plan in plans] == expected
    assert {plan.source for plan in plans} == {source}


def test_slurm_tasks_agree_on_where_to_meet_and_another_step_meets_elsewhere() -> None:
    plans = [detect(environ) for environ in captured("srun3")]
    assert {plan.master_addr for plan in plans} == {"127.0.0.1"}
    (port,) = {plan.master_port for plan in plans}
    other = detect({**captured("srun3")[0], "SLURM_STEP_ID": "1"}).master_port
    assert port != other
    chosen = detect({**captured("srun3")[0], "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"})
    assert (chosen.master_addr, chosen.master_port) == ("10.0.0.7", 1234)


def test_a_slurm_task_has_the_variables_that_libraries_look_for_and_they_give_the_same_plan() -> None:
    for environ in captured("srun_in_sbatch"):
        plan = detect(environ)
        again = detect({**environ, **plan.variables()})
        assert numbers(again) == numbers(plan)
        assert (again.master_addr, again.master_port) == (plan.master_addr, plan.master_port)


@pytest.mark.parametrize("special", ["4294967290", "4294967291", "4294967292", "4294967294"])
def test_the_shell_of_an_allocation_is_no_rank(special: str) -> None:
    interactive = {**captured("srun_in_sbatch")[0], "SLURM_STEP_ID": special}
    assert source_of(interactive) == "single"


SRUN3 = captured("srun3")


@pytest.mark.parametrize(
    ("environ", "changed", "both_values"),
    [
        (SRUN3[0], {"SLURM_NTASKS": "4"}, ("SLURM_STEP_NUM_TASKS is 3", "SLURM_NTASKS is 4")),
        (SRUN3[2], {"SLURM_PROCID": "3"}, ("SLURM_PROCID is 3", "SLURM_STEP_NUM_TASKS is 3")),
        (SRUN3[0], {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, ("2(x2), 4 tasks", "SLURM_STEP_NUM_TASKS is 3")),
        (SRUN3[0], {"SLURM_STEP_NODELIST": "n[1-3]"}, ("n[1-3], 3 nodes", "SLURM_STEP_TASKS_PER_NODE is 2,1")),
        (SRUN3[2], {"SLURM_NODEID": "2"}, ("SLURM_NODEID is 2", "SLURM_STEP_TASKS_PER_NODE is 2,1")),
        (SRUN3[2], {"SLURM_LOCALID": "1"}, ("SLURM_LOCALID is 1", "SLURM_STEP_TASKS_PER_NODE is 2,1")),
        (SRUN3[1], {"SLURM_PROCID": "2"}, ("SLURM_PROCID is 2", "0,1")),
        (SRUN3[0], {"SLURM_PROCID": "first"}, ("SLURM_PROCID", "'first'")),
        (SRUN3[0], {"SLURM_STEP_TASKS_PER_NODE": "2(x"}, ("SLURM_STEP_TASKS_PER_NODE", "'2(x'")),
        (SRUN3[0], {"DIST_TRAIN_NUM_PROCESSES": "4"}, ("is 4", "started 3")),
        (SRUN3[0], {"DIST_TRAIN_NUM_PROCESSES": "4:8"}, ("is 4:8", "started 3")),
        (SRUN3[0], {"DIST_TRAIN_NUM_PROCESSES": "many"}, ("N or MIN:MAX", "'many'")),
        ({}, {"DIST_TRAIN_NUM_PROCESSES": "2"}, ("is 2", "started 1")),
        ({}, {"RANK": "2", "WORLD_SIZE": "2"}, ("RANK is 2", "WORLD_SIZE is 2")),
        ({"RANK": "0"}, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "3"}, ("LOCAL_WORLD_SIZE is 3", "WORLD_SIZE, 2")),
        ({"RANK": "0", "WORLD_SIZE": "2"}, {"MASTER_ADDR": "h", "MASTER_PORT": "0"}, ("MASTER_PORT", "'0'")),
        ({"RANK": "0", "WORLD_SIZE": "2"}, {"MASTER_ADDR": "h"}, ("WORLD_SIZE is 2", "MASTER_PORT is not set")),
    ],
)
def test_a_contradiction_ends_with_78_both_values_and_what_to_type(
    environ: dict[str, str], changed: dict[str, str], both_values: tuple[str, str]
) -> None:
    with pytest.raises(SetupError) as caught:
        detect({**environ, **changed})
    assert caught.value.exit_code == EXIT_CONFIG and caught.value.hint
    assert all(value in caught.value.message for value in both_values), caught.value.message


def test_the_number_asked_for_may_be_a_range() -> None:
    assert detect({**SRUN3[0], "DIST_TRAIN_NUM_PROCESSES": "2:4"}).world_size == 3


def test_ranks_that_are_not_dealt_out_node_by_node_are_refused_by_every_one_of_them() -> None:
    for environ in captured("sruncyclic"):
        with pytest.raises(SetupError, match="node by node") as caught:
            detect(environ)
        assert caught.value.hint == "srun --distribution=block"


@pytest.mark.parametrize("launcher", ["accelerate_cpu", "accelerate_multicpu"])
def test_an_accelerate_launch_that_started_one_process_for_several_is_named(launcher: str) -> None:
    (environ,) = captured(launcher)
    (problem,) = rank_problems(environ)
    assert "asked for several processes and started this one alone" in problem.message
    assert "distributed_type: MULTI_GPU" in problem.hint


def test_no_captured_environment_holds_a_path_or_a_host_of_the_machine_it_came_from() -> None:
    for entry in CAPTURED:
        assert not any("/" in value for value in entry["environ"].values())
