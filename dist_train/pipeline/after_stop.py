"""Ends a rank after a stop: for good, or so that its agent goes on without the nodes that leave."""

from __future__ import annotations

import os
import sys

from dist_train.cluster.elastic import Agent
from dist_train.distributed.leaving import agree
from dist_train.distributed.watchdog.stop_signals import StopRequest
from dist_train.distributed.world import World
from dist_train.errors import NodeLeft, PeerError, Preempted
from dist_train.run_dir.agents import let_go_on
from dist_train.run_dir.paths import RunDir


def after_stop(stopped: Preempted, world: World, run_dir: RunDir, agent: Agent, grace: float) -> Preempted:
    """Returns the error with which this rank ends after an agreed stop: `stopped`, or a NodeLeft. Collective.

    Rank 0 removes the file STOP if the whole run stops: the request is fulfilled, so the same command may resume.

    Args:
        grace: seconds that a rank may take to stop.
    """
    try:
        found = agree(world, agent, lambda: world.is_main and os.path.exists(run_dir.stop), grace)
    except (RuntimeError, PeerError):  # a rank was killed after the state was saved
        ended, others_go_on = _alone(stopped.message, world.stop, run_dir, agent), False
    else:
        if found.text and world.rank == found.speaker:
            print(f"dist-train: {found.text}", file=sys.stderr, flush=True)
        others_go_on = bool(found.leaving)
        ended = _without(run_dir, stopped.message) if found.leaving and agent.node not in found.leaving else stopped
    if world.is_main and not others_go_on and not isinstance(ended, NodeLeft):
        run_dir.stop.unlink(missing_ok=True)
    return ended


def after_lost_peer(run_dir: RunDir, attempt: int, stop: StopRequest, agent: Agent) -> Preempted:
    """Returns the error with which this rank ends if another one was ended during a stop, before they could agree."""
    reason = "another rank was asked to stop and did not stop in time; the last checkpoint is kept"
    if not os.path.exists(run_dir.leaving(attempt)):
        return Preempted(reason)
    return _alone(reason, stop, run_dir, agent)


def _alone(reason: str, stop: StopRequest, run_dir: RunDir, agent: Agent) -> Preempted:
    """Returns the error with which a rank ends that has lost another one: that one's node may have left."""
    if not agent.may_go_on or stop.signals or os.path.exists(run_dir.stop):
        return Preempted(reason)
    return _without(run_dir, reason)


def _without(run_dir: RunDir, reason: str) -> NodeLeft:
    """Returns the error with which a rank ends so that its agent goes on."""
    let_go_on(run_dir, os.environ, more=1)
    return NodeLeft(reason)
