"""Lets nodes leave and join a run under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.elastic_job import Job

pytestmark = pytest.mark.timeout(900)

# As docs/cluster.md has it.
STORE = """
import signal, sys
import torch.distributed as dist
store = dist.TCPStore("0.0.0.0", int(sys.argv[1]), is_master=True, wait_for_workers=False)
signal.pause()
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[[str], Job]]:
    jobs: list[Job] = []

    def make(nodes: str) -> Job:
        jobs.append(Job(tmp_path, nodes))
        return jobs[-1]

    yield make
    for each in jobs:
        for node in each.nodes:
            node.kill()


@pytest.mark.slow
def test_one_of_two_nodes_leaves_and_the_run_goes_on_to_its_end(job: Callable[[str], Job]) -> None:
    run = job("1:2")
    stays = run.node(addr="127.0.0.2")  # rank 0 is on the node with the lower address: on the one that leaves
    run.reaches(1)
    leaves = run.launch()
    run.reaches(2)
    leaves.leave()
    assert run.code(leaves) == 75, run.printed()
    run.reaches(1)
    assert run.status()["state"] == "running"
    run.make("fast")
    assert run.code(stays) == 0, run.printed()
    run.ends_done()
    assert "leaves: the run goes on with 1 rank on 1 node, once their agents have met again" in stays.printed()
    assert not list(run.run_dir.logs.glob(".agent-*"))


@pytest.mark.long
def test_three_nodes_become_two_and_one_and_two_again(job: Callable[[str], Job]) -> None:
    run = job("1:3")
    first, second = run.node(), run.node()
    run.reaches(2)
    third = run.node()
    run.reaches(3)
    third.leave()
    run.reaches(2)
    second.leave()
    run.reaches(1)
    again = run.node()
    run.reaches(2)
    run.make("fast")
    assert [run.code(node) for node in (first, again)] == [0, 0], run.printed()
    run.ends_done()
    sizes = [step["world_size"] for step in run.steps()]
    assert [size for size, before in zip(sizes, [0, *sizes], strict=False) if size != before][-5:] == [2, 3, 2, 1, 2]


@pytest.mark.slow
def test_nodes_leave_and_come_back_while_the_model_is_in_shards(job: Callable[[str], Job]) -> None:
    run = job("1:3")
    shards = ("--strategy", "fsdp", "--train.optim.name", "adamw", "--train.ema_decay", "0.9")
    nodes = [run.launch(*shards) for _ in range(3)]
    run.reaches(3)
    for left in (2, 1):
        nodes[left].leave()
        run.reaches(left)
        assert run.code(nodes[left]) == 75, run.printed()
    nodes[1:] = [run.launch(*shards) for _ in range(2)]
    run.reaches(3)
    run.make("fast")
    assert [run.code(node) for node in nodes] == [0, 0, 0], run.printed()
    run.ends_done()
    sizes = [step["world_size"] for step in run.steps()]
    assert [size for size, before in zip(sizes, [0, *sizes], strict=False) if size != before][-4:] == [3, 2, 1, 3]
    assert "train: in shards over 3 ranks" in run.printed() and "strategy fsdp runs as single: 1 rank" in run.printed()


@pytest.mark.long
def test_a_node_leaves_during_a_step_that_is_longer_than_the_grace(job: Callable[[str], Job]) -> None:
    run = job("1:2")
    grace = ("--stop.grace", "5", "--checkpoint.every_steps", "5")
    stays, leaves = run.node(*grace), run.node(*grace)
    run.reaches(2)
    run.until(lambda: len(run.steps()) > 10, "checkpoint")
    run.make("hold")
    leaves.leave()
    run.code(leaves)
    run.until(lambda: run.status()["state"] == "preempted", "end of the attempt")
    run.remove("hold")
    run.reaches(1)
    run.make("fast")
    assert run.code(stays) == 0, run.printed()
    run.ends_done()


@pytest.mark.slow
def test_all_nodes_are_told_within_a_second_and_the_run_stops(job: Callable[[str], Job]) -> None:
    run = job("1:2")
    nodes = [run.launch(), run.launch()]
    run.reaches(2)
    nodes[1].leave()
    time.sleep(1)  # as a scheduler tells one node after the other
    nodes[0].leave()
    assert [run.code(node) for node in nodes] == [75, 75], run.printed()
    assert run.status()["state"] == "preempted"
    assert "leaves" not in run.printed()


@pytest.mark.long
def test_the_file_stop_ends_all_nodes(job: Callable[[str], Job]) -> None:
    run = job("1:2")
    nodes = [run.launch(), run.launch()]
    run.reaches(2)
    run.run_dir.stop.touch()
    assert [run.code(node) for node in nodes] == [75, 75], run.printed()
    assert run.status()["state"] == "preempted" and not run.run_dir.stop.exists()


@pytest.mark.long
def test_the_node_of_the_rendezvous_leaves_and_the_others_say_that_they_cannot_go_on(job: Callable[[str], Job]) -> None:
    run = job("1:2")
    host, other = run.node(), run.launch()
    run.reaches(2)
    host.leave()
    assert run.code(other) == 75, run.printed()
    assert "leaves, where the rendezvous is: the others cannot meet again without it" in other.printed()
    assert run.status()["state"] == "preempted"


@pytest.mark.long
def test_any_node_may_leave_where_the_rendezvous_is_on_none_of_them(job: Callable[[str], Job]) -> None:
    run = job("1:2")
    run.hosted = True
    store = subprocess.Popen([sys.executable, "-c", STORE, run.port], env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        leaves = run.node(ranks=2)
        run.reaches(2)
        stays = run.node(ranks=2)
        run.reaches(4)
        leaves.leave()
        run.reaches(2)
        run.make("fast")
        assert run.code(stays) == 0, run.printed()
    finally:
        store.kill()
        store.wait(30)
    run.ends_done()


@pytest.mark.slow
def test_a_fixed_number_of_nodes_stops_all_together(job: Callable[[str], Job]) -> None:
    run = job("2")
    nodes = [run.node(), run.node()]
    run.reaches(2)
    nodes[1].leave()
    run.code(nodes[1])
    run.until(lambda: run.status()["state"] == "preempted", "stop")
    run.until(lambda: not psutil.Process(nodes[0].process.pid).children(), "end of the rank")
    assert run.status() == {
        "state": "preempted",
        "stage": "train",
        "step": len(run.steps()),
        "restarts": 0,
        "error": None,
    }
    assert "leaves" not in run.printed()


@pytest.mark.long
def test_agents_without_a_restart_left_stop_all_together(job: Callable[[str], Job]) -> None:
    run = job("1:2")
    stays, leaves = run.node(restarts=0), run.node()
    run.reaches(2)
    leaves.leave()
    run.until(lambda: run.status()["state"] == "preempted", "stop")
    run.until(lambda: "others have no restart left (--max-restarts): all end" in stays.printed(), "reason")
    run.code(leaves)
