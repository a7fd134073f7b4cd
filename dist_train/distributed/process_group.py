"""Forms and closes the process group, and reports which rank failed first."""

from __future__ import annotations

import gc
import os
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from dist_train.cluster.rank_plan import RankPlan, detect
from dist_train.cluster.slurm_lists import show_hostnames
from dist_train.config.tree import RunConfig
from dist_train.distributed.preflight import check_addresses, check_interfaces, find_rank_0, hosts_store, whereabouts
from dist_train.distributed.world import FAREWELL_SECONDS, World
from dist_train.errors import PeerError, Preempted, SetupError, first_line

T = TypeVar("T")
_FORMING_SECONDS = 300.0
_ANSWER_SECONDS = 15.0  # for a store, which answers at once, on the busiest node
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


@contextmanager
def join(run: RunConfig, check_collectives: bool = False) -> Iterator[World]:
    """Forms the process group, yields the world, ends the group.

    An error in the body is reported to the other ranks. PeerError replaces one that only echoes another rank's failure.

    Args:
        check_collectives: torch compares operation, shape and dtype of each collective over the ranks, which is slow, and
            raises RuntimeError on every rank where they differ. This is torch's TORCH_DISTRIBUTED_DEBUG=DETAIL.

    Raises:
        SetupError: contradicting variables, or missing devices, before any rank waits for another; or missing ranks.
    """
    level = dist.get_debug_level()
    try:
        if check_collectives:
            dist.set_debug_level(dist.DebugLevel.DETAIL)
        world = _form(run)
    finally:
        dist.set_debug_level(level)
    try:
        yield world
    except Preempted:  # on all ranks, as they agreed
        _end(world)
        raise
    except BaseException as error:
        raised = _echo_of_peer(world, error) or error
        _end_in_failure(world, raised)
        if raised is not error:
            raise raised from error
        raise
    else:
        _end(world)


def _end(world: World) -> None:
    world.take_leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_in_failure(world: World, error: BaseException) -> None:
    _while_it_answers(world, lambda: world.report_failure(error))
    if world.is_main and dist.is_initialized() and world.device.type == "cpu":
        # Frees the ranks that wait for this one in a collective, while it stays because it holds the store. The frames of
        # the failed calls hold a DDP that keeps the group alive. In a thread, as pending work can block it.
        seen: BaseException | None = error
        while seen is not None:
            traceback.clear_frames(seen.__traceback__)
            seen = seen.__cause__ or seen.__context__
        gc.collect()
        release = threading.Thread(target=dist.destroy_process_group, daemon=True)
        release.start()
        release.join(FAREWELL_SECONDS)
    _while_it_answers(world, world.take_leave)
    if "TORCHELASTIC_ERROR_FILE" in os.environ and not isinstance(error, PeerError):
        get_error_handler().record_exception(error)  # torchrun shows it as the root cause


def _while_it_answers(world: World, question: Callable[[], T]) -> T | None:
    """Returns the store's answer; None where its node is gone."""
    try:
        return world.asked(question, 2 * FAREWELL_SECONDS)
    except PeerError:
        return None


def _echo_of_peer(world: World, error: BaseException) -> PeerError | None:
    """Returns the PeerError that `error`, the RuntimeError of a broken collective, stands for."""
    if not isinstance(error, RuntimeError) or world.world_size == 1:
        return None
    failure = _while_it_answers(world, world.peer_failure)
    if failure is not None:
        return PeerError(f"rank {failure['rank']} failed: {failure['error']}")
    reason = first_line(error)
    if "Timed out" in reason:
        return PeerError(
            f"another rank did not answer within {world.timeout:g} s: {reason}",
            "raise --run.timeout, or look at what the ranks do",
        )
    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError)) or any(words in reason for words in _LOST):
        return PeerError(f"the connection to another rank was lost (it was killed, or its node is gone): {reason}")
    return None


def _device(requested: str, local_rank: int, local_world_size: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "cuda" and count < local_world_size:
        raise SetupError(
            f"run.device is cuda, but this node has {count} CUDA devices for {local_world_size} ranks",
            "--run.device auto, or fewer ranks: torchrun --nproc_per_node ...",
        )
    if requested == "cpu" or count < local_world_size:
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


def _require_store(plan: RankPlan) -> None:
    """Asks in a thread whether a store answers: torch 2.14's client waits for ever where something else listens.

    Raises:
        SetupError: the listener at MASTER_PORT is no store of ranks.
    """
    limit, outcome = timedelta(seconds=_ANSWER_SECONDS), list[bool]()

    def connect() -> None:
        with suppress(dist.DistError):
            dist.TCPStore(plan.master_addr, plan.master_port, is_master=False, timeout=limit, wait_for_workers=False)
            outcome.append(True)

    asking = threading.Thread(target=connect, daemon=True)
    asking.start()
    asking.join(_ANSWER_SECONDS)
    if not outcome:
        raise plan.port_taken()


def _form(run: RunConfig) -> World:
    plan = detect(os.environ, show_hostnames)
    os.environ.update(plan.variables())
    plan.require_free_port()
    rank, local_rank = plan.rank, plan.local_rank
    world_size, local_world_size = plan.world_size, plan.local_world_size
    device = _device(run.device, local_rank, local_world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world = World(rank, local_rank, world_size, local_world_size, device, run.timeout)
    if world_size == 1:
        return world
    check_interfaces(os.environ, device.type == "cuda")
    find_rank_0(plan, os.environ, lambda sentence: print(f"dist-train: {sentence}", file=sys.stderr, flush=True))
    if not hosts_store(plan, os.environ):
        _require_store(plan)
    timeout = timedelta(seconds=run.timeout)
    # The store first: ranks wait on it while rank 0 works alone. With torchrun on one node the agent holds it.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=_FORMING_SECONDS)))
        store.set_timeout(timeout)
        check_addresses(store, whereabouts(plan, os.environ), world_size, _FORMING_SECONDS)
        dist.init_process_group(
            backend, store=dist.PrefixStore("dist_train", store), rank=rank, world_size=world_size, timeout=timeout
        )
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = first_line(error)
        if "EADDRINUSE" in reason and hosts_store(plan, os.environ):
            raise plan.port_taken() from error
        raise SetupError(
            f"the {world_size} ranks did not meet at {where}: {reason}",
            "start all of them, on nodes that reach each other; another port: MASTER_PORT",
        ) from error
    world.store = store
    world.nonce = "".join(world.gather(uuid.uuid4().hex)[:1])
    kinds = world.gather(device.type)
    if len(set(kinds)) > 1:
        raise SetupError(
            f"some ranks have CUDA devices and some have not: {kinds}",
            "--run.device cpu, or leave out the nodes without GPUs",
        )
    return world
