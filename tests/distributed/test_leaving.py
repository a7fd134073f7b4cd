"""Decides after a stop which nodes leave, from the answers of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dist_train.cluster.elastic import Agent
from dist_train.distributed.leaving import Answer, Outcome, decide

SETTLE = 3.0


def answers(
    told: str,
    least: int = 1,
    most: int = 3,
    restarts: Sequence[int] = (1, 1, 1),
    host: int | None = None,
    everybody: int | None = None,
    waited: float = SETTLE,
) -> list[Answer]:
    """Returns the answers of ranks given as "10 11": a word for each node, 1 for each rank that got the signal."""
    words = told.split()
    return [
        Answer(
            agent=Agent(node, len(words), least, most, restarts[node], hosts=node == host),
            host=f"gpu{node}",
            told=flag == "1",
            everybody=node == everybody,
            waited=waited if flag == "1" else 0.0,
        )
        for node, word in enumerate(words)
        for flag in word
    ]


def outcome(found: list[Answer]) -> Outcome:
    decided = decide(found, SETTLE)
    assert decided is not None
    return decided


@pytest.mark.parametrize(
    ("told", "leaving", "speaker", "text"),
    [
        ("0 1", {1}, 0, "node 1 (gpu1) leaves: the run goes on with 1 rank on 1 node, once"),
        ("11 00", {0}, 2, "node 0 (gpu0) leaves: the run goes on with 2 ranks on 1 node, once"),
        ("0 1 0", {1}, 0, "node 1 (gpu1) leaves: the run goes on with 2 ranks on 2 nodes, once"),
        ("1 0 1", {0, 2}, 1, "nodes 0 (gpu0), 2 (gpu2) leave: the run goes on with 1 rank on 1 node, once"),
    ],
)
def test_nodes_that_were_told_leave_and_the_first_rank_that_stays_says_so(
    told: str, leaving: set[int], speaker: int, text: str
) -> None:
    found = outcome(answers(told))
    assert (found.leaving, found.speaker) == (leaving, speaker)
    assert found.text.startswith(text)


def test_no_node_leaves_before_the_others_had_time_to_be_told_too() -> None:
    assert decide(answers("0 1", waited=SETTLE - 0.1), SETTLE) is None
    assert decide(answers("01 11", waited=SETTLE - 0.1), SETTLE) is None
    assert outcome(answers("1 1", waited=0.1)) == Outcome()


@pytest.mark.parametrize(
    "found",
    [
        answers("11 11"),
        answers("0 0", everybody=0, waited=0.0),  # the file STOP
        answers("0 1", everybody=1, waited=0.0),  # and a signal that agents do not pass on
        answers("0 1", least=2, most=2, waited=0.0),  # a fixed number of nodes
        answers("01 00"),  # one rank alone: not by its agent
        answers("01 11"),
        answers("0 0", waited=0.0),
    ],
)
def test_the_whole_run_stops_without_a_word_where_no_agent_was_told_to_leave(found: list[Answer]) -> None:
    assert outcome(found) == Outcome()


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (answers("0 0 1 1", least=3, most=4, restarts=(1,) * 4), "fewer than 3 nodes (--nnodes) would be left"),
        (answers("0 1", least=2), "fewer than 2 nodes (--nnodes) would be left"),
        (answers("0 0 1", restarts=(1, 0, 1)), "others have no restart left (--max-restarts)"),
    ],
)
def test_the_whole_run_stops_and_says_why_where_the_others_cannot_go_on(found: list[Answer], reason: str) -> None:
    decided = outcome(found)
    assert not decided.leaving and reason in decided.text


def test_a_node_that_leaves_needs_no_restart() -> None:
    assert outcome(answers("0 1", restarts=(1, 0))).leaving == {1}


def test_without_the_node_of_the_rendezvous_the_others_end_in_failure_and_say_why() -> None:
    found = outcome(answers("1 0", host=0))
    assert found.leaving == {0} and found.speaker == 1
    assert found.text.startswith("node 0 (gpu0) leaves, where the rendezvous is: the others cannot meet again")
    assert outcome(answers("0 1", host=0)).text.startswith("node 1 (gpu1) leaves: the run goes on")
