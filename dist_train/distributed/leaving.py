"""Agrees, after a stop under torchrun, whether some nodes leave and the others go on, or all ranks end.

A node whose agent gets a signal passes it on to all ranks of the node, and ends with them. The ranks of the other nodes
end with an exit code other than 0, so that their agents start ranks again, on the nodes that are left. If the agents of
all nodes got the signal, the job is to end. They may get it a second apart, so ranks wait for that.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_train.cluster.elastic import Agent
from dist_train.distributed.watchdog.heartbeat import STOP_REASONS
from dist_train.distributed.watchdog.stop_signals import StopRequest
from dist_train.distributed.world import World

_SETTLE_SECONDS = 3.0  # between a signal to one node and those to the others, and the end of the last step
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Answer:
    """State of one rank after the ranks agreed to stop.

    Attributes:
        agent: the agent of its node.
        host: name of its machine, for people.
        told: True if it got the agent's signal.
        everybody: True if it knows that the whole run is to stop.
        waited: seconds since the signal.
    """

    agent: Agent
    host: str
    told: bool
    everybody: bool
    waited: float


@dataclass(frozen=True)
class Outcome:
    """Decision after a stop.

    Attributes:
        leaving: numbers of the nodes that leave, where the others go on; empty where all ranks end.
        text: what to tell people; "" for a stop of the whole run.
        speaker: the rank that tells it: the first of those that stay, so that it is read where the run goes on.
    """

    leaving: frozenset[int] = frozenset()
    text: str = ""
    speaker: int = 0


def decide(answers: Sequence[Answer], settle: float) -> Outcome | None:
    """Returns the decision that follows from the answers of all ranks; None while nodes may still be told.

    Args:
        settle: seconds after the first signal from which on no further node will be told.
    """
    nodes = {each.agent.node for each in answers}
    told = {node for node in nodes if all(each.told for each in answers if each.agent.node == node)}
    partly = {each.agent.node for each in answers if each.told} - told
    if any(each.everybody for each in answers) or not any(each.told for each in answers) or told == nodes:
        return Outcome()
    staying = [each for each in answers if each.agent.node not in told]
    if not any(each.agent.elastic for each in answers):
        return Outcome()
    if max(each.waited for each in answers) < settle:
        return None
    if partly:  # some ranks of a node got a signal that is not their agent's
        return Outcome()
    speaker = next(rank for rank, each in enumerate(answers) if each.agent.node not in told)
    who = _named(sorted(told), answers)
    least, left = max(each.agent.least for each in staying), len(nodes) - len(told)
    if left < least:
        return Outcome(frozenset(), f"{who}, and fewer than {least} nodes (--nnodes) would be left: all end", speaker)
    if any(each.agent.restarts < 1 for each in staying):
        return Outcome(frozenset(), f"{who}, and others have no restart left (--max-restarts): all end", speaker)
    if any(each.agent.hosts for each in answers if each.agent.node in told):
        text = f"{who}, where the rendezvous is: the others cannot meet again without it, and end, too"
        hint = "start again with the same command, and --rdzv-endpoint on a node that stays"
        return Outcome(frozenset(told), f"{text}\n  -> {hint}", speaker)
    size = f"{len(staying)} rank{'s' * (len(staying) > 1)} on {left} node{'s' * (left > 1)}"
    return Outcome(frozenset(told), f"{who}: the run goes on with {size}, once their agents have met again", speaker)


def _named(nodes: Sequence[int], answers: Sequence[Answer]) -> str:
    """Returns "node 1 (host) leaves", or the same of several nodes."""
    hosts = {each.agent.node: each.host for each in answers}
    names = [f"{node} ({hosts[node]})" for node in nodes]
    return f"node {names[0]} leaves" if len(names) == 1 else f"nodes {', '.join(names)} leave"


def agree(world: World, agent: Agent, stop_file: Callable[[], bool], grace: float) -> Outcome:
    """Agrees with all ranks, which have stopped, on the decision. Collective.

    Args:
        stop_file: tells whether this rank sees the file STOP.
        grace: seconds that a rank may take to stop.
    """
    if agent.nodes == 1:
        return Outcome()
    settle = min(_SETTLE_SECONDS, grace / 2)
    while True:
        found = decide(world.gather(_answer(world.stop, agent, stop_file())), settle)
        if found is not None:
            return found
        time.sleep(_POLL_SECONDS)  # every rank sees the same answers, so all of them ask again


def _answer(stop: StopRequest, agent: Agent, stop_file: bool) -> Answer:
    told = bool(stop.signals.intersection(agent.told_by))
    by_person = bool(stop.signals.difference(agent.told_by))
    waited = time.monotonic() - stop.since if told else 0.0
    return Answer(agent, socket.gethostname(), told, by_person or stop_file or stop.reason == STOP_REASONS[1], waited)
