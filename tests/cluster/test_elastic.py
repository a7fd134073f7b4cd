"""Reads what torchrun's agent does with nodes that come and go, from its command line and a rank's variables."""

from __future__ import annotations

import pytest

from dist_train.cluster.elastic import Agent, agent_of, plan_of

VARIABLES = {
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT",
}
TORCHRUN = ["python", "/opt/bin/torchrun"]
RUN = ["-m", "dist_train", "run", "base.yaml"]


@pytest.mark.parametrize(
    ("words", "environ", "nodes"),
    [
        (["--nnodes", "1:4"], {}, (1, 4)),
        (["--nnodes=2:3"], {}, (2, 3)),
        (["--nnodes", "2"], {}, (2, 2)),
        (["--nnodes", "2:2"], {}, (2, 2)),
        ([], {}, (2, 2)),
        ([], {"PET_NNODES": "1:2"}, (1, 2)),
        (["--nnodes", "2"], {"PET_NNODES": "1:2"}, (2, 2)),
    ],
)
def test_the_numbers_of_nodes_are_those_of_the_agent_s_command(
    words: list[str], environ: dict[str, str], nodes: tuple[int, int]
) -> None:
    agent = plan_of([*TORCHRUN, *words, *RUN], VARIABLES | environ, [])
    assert (agent.least, agent.most) == nodes
    assert (agent.node, agent.nodes, agent.restarts, agent.told_by) == (1, 2, 2, ("SIGTERM", "SIGINT"))
    assert agent.elastic == (nodes[0] < nodes[1])
    assert agent.may_go_on == (nodes[0] < 2)


@pytest.mark.parametrize(
    ("words", "listening", "hosts"),
    [
        (["--rdzv-backend", "c10d", "--rdzv-endpoint", "gpu1:29511"], [22, 29511], True),
        (["--rdzv_backend=c10d", "--rdzv_endpoint=[fd00::1]:29511"], [29511], True),
        (["--rdzv-backend", "c10d", "--rdzv-endpoint", "gpu1:29511"], [29400], False),
        (["--rdzv-backend", "c10d", "--rdzv-endpoint", "gpu1"], [29400], True),
        (["--rdzv-backend", "etcd-v2", "--rdzv-endpoint", "gpu1:2379"], [2379], False),
    ],
)
def test_the_agent_that_listens_at_the_endpoint_hosts_the_rendezvous(
    words: list[str], listening: list[int], hosts: bool
) -> None:
    assert plan_of([*TORCHRUN, *words, *RUN], VARIABLES, listening).hosts == hosts


def test_an_agent_without_a_restart_left_cannot_go_on() -> None:
    spent = VARIABLES | {"TORCHELASTIC_RESTART_COUNT": "3"}
    assert not plan_of([*TORCHRUN, "--nnodes", "1:2", *RUN], spent, []).may_go_on


def test_a_rank_without_an_agent_has_a_fixed_number_of_nodes() -> None:
    assert agent_of({"RANK": "0", "WORLD_SIZE": "2"}) == Agent()
    assert not agent_of({"TORCHELASTIC_RUN_ID": "x"}).elastic  # nobody of this test's parents is torchrun
