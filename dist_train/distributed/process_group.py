"""Forms and closes the process group, and reports which rank failed first."""

from __future__ import annotations

import gc
import os
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from queue import Empty, Queue
from threading import Thread
from typing import TypeVar

import torch
import torch.distributed as dist

from dist_train.cluster.error_notes import tell_agent
from dist_train.cluster.rank_plan import RankPlan, Source, detect
from dist_train.cluster.slurm_lists import show_hostnames
from dist_train.config.tree import RunConfig
from dist_train.distributed.devices import choose_device, gpu_identity, visible_gpus
from dist_train.distributed.preflight import check_interfaces, find_rank_0, hosts_store
from dist_train.distributed.rank_addresses import check_addresses, rank_address
from dist_train.distributed.watchdog.stop_signals import StopRequest
from dist_train.distributed.world import FAREWELL_SECONDS, World, outcome
from dist_train.errors import PeerError, Preempted, SetupError, first_line, in_words

T = TypeVar("T")
_FORMING_SECONDS = 300.0
_ANSWER_SECONDS = 15.0  # generous: a store answers at once, even on a busy node
_STOP_SECONDS = 0.1  # between looks for a request to stop
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


@contextmanager
def join(
    run: RunConfig, check_collectives: bool = False, stop: StopRequest | None = None, at_least: float = 0.0
) -> Iterator[World]:
    """Forms the process group, yields the world, and closes the group.

    An error in the body is reported to the other ranks. If it is only the consequence of another rank's failure, a
    PeerError that names that rank is raised instead. An error of other code is raised as a ForeignError.

    Args:
        check_collectives: compares operation, shape and dtype of each collective over the ranks, which is slow. If they
            differ, torch raises RuntimeError on every rank, as with TORCH_DISTRIBUTED_DEBUG=DETAIL.
        stop: ends the wait for the other ranks, before there is anything to save.
        at_least: seconds that a wait for another rank may take even if `run.timeout` is shorter.

    Raises:
        Preempted: `stop` was requested before the ranks had met.
        SetupError: environment variables contradict each other, devices are missing (both before any rank waits for
            another), or ranks are missing.
    """
    level = dist.get_debug_level()
    try:
        if check_collectives:
            dist.set_debug_level(dist.DebugLevel.DETAIL)
        world = _form(run, max(run.timeout, at_least), stop or StopRequest())
    finally:
        dist.set_debug_level(level)
    try:
        yield world
    except Preempted:  # all ranks agreed to stop, so all of them are here
        _end(world)
        raise
    except BaseException as error:
        raised = _echo_of_peer(world, error) or in_words(error)
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
        # Destroying the group releases ranks that wait for this one in a collective, while this process still hosts the
        # store. The failed calls' frames reference a DDP that keeps the group alive, so they are cleared first.
        # The destruction runs in a thread because pending work can block it.
        seen: BaseException | None = error
        while seen is not None:
            traceback.clear_frames(seen.__traceback__)
            seen = seen.__cause__ or seen.__context__
        gc.collect()
        release = Thread(target=dist.destroy_process_group, daemon=True)
        release.start()
        release.join(FAREWELL_SECONDS)
    _while_it_answers(world, world.take_leave)
    tell_agent(f"dist-train: {error}", os.environ, echo=isinstance(error, PeerError))


def _while_it_answers(world: World, question: Callable[[], T]) -> T | None:
    """Returns the store's answer; None if the store does not answer."""
    try:
        return world.asked(question, 2 * FAREWELL_SECONDS)
    except PeerError:
        return None


def _echo_of_peer(world: World, error: BaseException) -> PeerError | None:
    """Returns a PeerError if `error` is a broken collective's RuntimeError, caused by another rank; else None."""
    if not isinstance(error, RuntimeError) or world.world_size == 1:
        return None
    failure = _while_it_answers(world, world.peer_failure)
    if failure is not None:
        return PeerError(f"rank {failure['rank']} failed: {failure['error']}")
    reason = first_line(error)
    if "Timed out" in reason:
        return PeerError(
            f"another rank did not answer within {world.timeout:g} s: {reason}",
            "raise --run.timeout, or check what the ranks are doing",
        )
    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError)) or any(words in reason for words in _LOST):
        return PeerError(f"the connection to another rank was lost (it was killed, or its node is gone): {reason}")
    return None


def _require_store(plan: RankPlan) -> None:
    """Checks that the listener at MASTER_PORT is a torch store.

    The check runs in a thread: torch 2.14's client waits forever if another program listens there.

    Raises:
        SetupError: the listener is not a torch store.
    """
    limit, outcome = timedelta(seconds=_ANSWER_SECONDS), list[bool]()

    def connect() -> None:
        with suppress(dist.DistError):
            dist.TCPStore(plan.master_addr, plan.master_port, is_master=False, timeout=limit, wait_for_workers=False)
            outcome.append(True)

    asking = Thread(target=connect, daemon=True)
    asking.start()
    asking.join(_ANSWER_SECONDS)
    if not outcome:
        raise plan.port_taken()


def without_own_gpu(requested: str, shared: str, source: Source, rank: int) -> torch.device:
    """Returns the CPU, for all ranks, as two of them would share a GPU.

    Raises:
        SetupError: CUDA is requested, or the ranks are tasks of a Slurm job, whose GPUs would lie idle.
    """
    if source == "slurm":
        hint = "srun --gpus-per-task=1 (or --gpus-per-node, as many as tasks); --run.device cpu to train on CPUs"
        raise SetupError(shared, hint)
    if requested == "cuda":
        raise SetupError(shared, "a rank for each GPU: torchrun --nproc_per_node GPUS, mpirun -n GPUS")
    if rank == 0:
        print(f"dist-train: {shared}; all ranks use the CPU", file=sys.stderr, flush=True)
    return torch.device("cpu")


def _unless_stopped(stop: StopRequest, work: Callable[[], T]) -> T:
    """Returns the result of `work`, which waits in C code, where no signal handler of Python runs.

    Raises:
        Preempted: `stop` was requested. The thread with the work ends with the process.
    """
    answer: Queue[Future[T]] = Queue()
    Thread(target=lambda: answer.put(outcome(work)), daemon=True).start()
    while True:
        with suppress(Empty):
            return answer.get(timeout=_STOP_SECONDS).result()
        if stop.requested:
            raise Preempted(f"asked to stop ({stop.reason}) before the ranks had met: nothing was begun")


def _meet(run: RunConfig, seconds: float, plan: RankPlan, device: torch.device) -> tuple[dist.Store, torch.device]:
    """Waits for the other ranks and forms the process group; returns its store, and the device that this rank can use.

    Raises:
        SetupError: the ranks do not meet.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    find_rank_0(plan, os.environ, lambda sentence: print(f"dist-train: {sentence}", file=sys.stderr, flush=True))
    if not hosts_store(plan, os.environ):
        _require_store(plan)
    timeout = timedelta(seconds=seconds)
    # The store is created first because ranks wait on it while rank 0 works alone. Under torchrun on one node, the
    # agent hosts it.
    try:
        store, _, _ = next(
            dist.rendezvous("env://", plan.rank, plan.world_size, timeout=timedelta(seconds=_FORMING_SECONDS))
        )
        store.set_timeout(timeout)
        mine = rank_address(plan, os.environ, gpu_identity(device))
        shared = check_addresses(store, mine, plan.world_size, _FORMING_SECONDS)
        if shared:
            device = without_own_gpu(run.device, shared, plan.source, plan.rank)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("dist_train", store),
            rank=plan.rank,
            world_size=plan.world_size,
            timeout=timeout,
        )
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = first_line(error)
        if "EADDRINUSE" in reason and hosts_store(plan, os.environ):
            raise plan.port_taken() from error
        raise SetupError(
            f"the {plan.world_size} ranks did not meet at {where}: {reason}",
            "start all ranks, on nodes that reach each other; to use another port, set MASTER_PORT",
        ) from error
    return store, device


def _form(run: RunConfig, timeout: float, stop: StopRequest) -> World:
    plan = detect(os.environ, show_hostnames)
    os.environ.update(plan.variables())
    plan.require_free_port()
    rank, local_rank = plan.rank, plan.local_rank
    world_size, local_world_size = plan.world_size, plan.local_world_size
    device = choose_device(run.device, local_rank, visible_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        return World(rank, local_rank, world_size, local_world_size, device, timeout)
    check_interfaces(os.environ, device.type == "cuda")
    store, device = _unless_stopped(stop, lambda: _meet(run, timeout, plan, device))
    world = World(rank, local_rank, world_size, local_world_size, device, timeout)
    world.store = store
    world.nonce = "".join(world.gather(uuid.uuid4().hex)[:1])
    kinds = world.gather(device.type)
    if len(set(kinds)) > 1:
        raise SetupError(
            f"some ranks have CUDA devices and some do not: {kinds}",
            "--run.device cpu, or leave out the nodes without GPUs",
        )
    return world
