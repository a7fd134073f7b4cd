"""The ranks of a run: who we are, what we do together, and the one place where a process group begins and ends."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from dist_train.collectives import collectives_checked, mismatch
from dist_train.config import RunConfig
from dist_train.errors import PeerError, SetupError
from dist_train.hostlist import show_hostnames
from dist_train.ranks import detect

T = TypeVar("T")
_POLL_SECONDS = 0.2  # longest slice between two looks at the store; law 4 allows a second
_FORMING_SECONDS = 300.0
_FAREWELL_SECONDS = 5.0  # how long rank 0, where it hosts the store, lets the others read it at the end
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


@dataclass
class World:
    """The ranks of one run, one process each.

    Attributes:
        rank: 0 .. world_size - 1 over all nodes.
        local_rank: 0 .. local_world_size - 1 on this node.
        device: where this rank's model lives.
        timeout: seconds after which a wait for another rank fails.
        nonce: agreed at the start, so that keys of an earlier attempt in the same store are never read.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout: float = 1800.0
    nonce: str = ""
    store: dist.Store | None = None
    _waits: int = 0

    @property
    def node_rank(self) -> int:
        return self.rank // self.local_world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cores(self) -> int:
        """Usable cores of this node, which its ranks share."""
        return len(os.sched_getaffinity(0))

    def share_of_cores(self) -> int:
        """The node's usable cores shared out among its ranks; at least one."""
        return max(1, self.cores // self.local_world_size)

    def all_reduce(self, tensor: torch.Tensor, operation: Literal["sum", "max"]) -> torch.Tensor:
        """Reduces `tensor` over all ranks, in place; returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Each rank's value, by rank. For small things and rare occasions."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank; the others pass None."""
        if self.world_size == 1:
            assert data is not None
            return data
        device = self.device if dist.get_backend() == "nccl" else torch.device("cpu")
        size = torch.tensor([len(data) if data is not None else 0], device=device)
        dist.broadcast(size, src=0)
        buffer = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
            if data
            else torch.empty(int(size), dtype=torch.uint8, device=device)
        )
        dist.broadcast(buffer, src=0)
        return buffer.cpu().numpy().tobytes()

    def on_rank_0(self, work: Callable[[], T], what: str, deadline: float | None = None) -> T:
        """Runs `work` on rank 0 alone; the others wait for its JSON-serializable result.

        They wait on the store, not in a collective, so that work longer than the process group's timeout kills nobody (law 4).

        Raises:
            PeerError: on the waiting ranks, if the work failed or took longer than `deadline` seconds (`timeout` where it is None).
        """
        return self._on_leader(0, work, what, deadline)

    def first_on_node(self, work: Callable[[], T], what: str, deadline: float | None = None) -> T:
        """Like `on_rank_0`, but once on each node, on its local rank 0."""
        return self._on_leader(self.rank - self.local_rank, work, what, deadline)

    def _on_leader(self, leader: int, work: Callable[[], T], what: str, deadline: float | None) -> T:
        if self.world_size == 1:
            return work()
        self._waits += 1
        key = f"{self.nonce}/{self._waits}/{leader}"
        assert self.store is not None
        if self.rank == leader:
            try:
                result = work()
                answer = json.dumps({"value": result})
            except BaseException as error:
                self.store.set(key, json.dumps({"error": _in_a_line(error)}))
                raise
            self.store.set(key, answer)
            return result
        self._wait(key, leader, what, self.timeout if deadline is None else deadline)
        received = json.loads(self.store.get(key))
        if "error" in received:
            raise PeerError(f"rank {leader} failed: {received['error']}")
        value: T = received["value"]
        return value

    def _wait(self, key: str, leader: int, what: str, deadline: float) -> None:
        assert self.store is not None
        end, pause = time.monotonic() + deadline, 0.001
        while not self.store.check([key]):
            self.raise_peer_failure()
            if time.monotonic() > end:
                raise PeerError(
                    f"rank {leader} did not finish ({what}) within {deadline:g} s",
                    "raise the stage's `deadline`, or look at what that rank does",
                )
            time.sleep(pause)
            pause = min(pause * 2, _POLL_SECONDS)

    def barrier(self, what: str) -> None:
        """Waits until every rank is here."""
        if self.world_size > 1:
            self.all_reduce(torch.zeros(1, device=self.device), "sum")
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def report_failure(self, error: BaseException) -> None:
        """Tells the other ranks why this one ends; the first report counts. Never raises: the error itself matters more."""
        if self.store is None:
            return
        try:
            if self.store.add(f"{self.nonce}/failures", 1) == 1:
                self.store.set(f"{self.nonce}/failure", json.dumps({"rank": self.rank, "error": _in_a_line(error)}))
        except RuntimeError:
            return  # the store died with the rank or agent that held it

    def peer_failure(self) -> dict[str, Any] | None:
        """The first failure that another rank reported: its "rank" and "error"."""
        if self.store is None:
            return None
        try:
            if self.store.check([f"{self.nonce}/failure"]):
                report: dict[str, Any] = json.loads(self.store.get(f"{self.nonce}/failure"))
                return report if report["rank"] != self.rank else None
        except RuntimeError:  # as above
            return None
        return None

    def raise_peer_failure(self) -> None:
        failure = self.peer_failure()
        if failure is not None:
            raise PeerError(f"rank {failure['rank']} failed: {failure['error']}")

    def take_leave(self) -> None:
        """The last use of the store: rank 0, where its process holds it, waits for the others, so that they can still read why it ends."""
        if self.store is None:
            return
        try:
            if self.rank != 0:
                self.store.add(f"{self.nonce}/gone", 1)
            elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                end = time.monotonic() + _FAREWELL_SECONDS
                while self.store.add(f"{self.nonce}/gone", 0) < self.world_size - 1 and time.monotonic() < end:
                    time.sleep(0.01)
        except RuntimeError:
            return  # as above


def _in_a_line(error: BaseException) -> str:
    if isinstance(error, PeerError):
        return str(error)
    return "".join(traceback.format_exception_only(error)).strip()


@contextmanager
def join(run: RunConfig, check_collectives: bool = False) -> Iterator[World]:
    """Forms the process group, yields the world, ends the group.

    An error in the body is reported to the other ranks. Where it is only the echo of another rank's failure, PeerError takes its place.

    Args:
        check_collectives: before each collective the ranks compare what they are about to call; slow.

    Raises:
        SetupError: contradicting variables, or devices that are not there; before any rank waits for another. Or ranks that do not come.
        CollectiveMismatchError: with `check_collectives`, on every rank, where they called different ones.
    """
    with collectives_checked() if check_collectives else nullcontext():
        world = _form(run)
    try:
        yield world
    except BaseException as error:
        raised = mismatch(error) or _echo_of_peer(world, error) or error
        _end_in_failure(world, raised)
        if raised is not error:
            raise raised from error
        raise
    else:
        world.take_leave()
        if dist.is_initialized():
            dist.destroy_process_group()


def _end_in_failure(world: World, error: BaseException) -> None:
    world.report_failure(error)
    if world.is_main and dist.is_initialized() and world.device.type == "cpu":
        # Frees the ranks that wait for this one in a collective while it stays for the store's sake. The frames of the failed
        # calls hold a DDP that keeps the group alive. In a thread, as pending work can block it.
        seen: BaseException | None = error
        while seen is not None:
            traceback.clear_frames(seen.__traceback__)
            seen = seen.__cause__ or seen.__context__
        gc.collect()
        release = threading.Thread(target=dist.destroy_process_group, daemon=True)
        release.start()
        release.join(_FAREWELL_SECONDS)
    world.take_leave()
    if "TORCHELASTIC_ERROR_FILE" in os.environ and not isinstance(error, PeerError):
        get_error_handler().record_exception(error)  # torchrun shows it as the root cause


def _echo_of_peer(world: World, error: BaseException) -> PeerError | None:
    """The PeerError that `error` stands for: what a broken collective raises is a RuntimeError."""
    if not isinstance(error, RuntimeError) or world.world_size == 1:
        return None
    failure = world.peer_failure()
    if failure is not None:
        return PeerError(f"rank {failure['rank']} failed: {failure['error']}")
    first_line = str(error).partition("\n")[0]
    if "Timed out" in first_line:
        return PeerError(
            f"another rank did not answer within {world.timeout:g} s: {first_line}",
            "raise --run.timeout, or look at what the ranks do",
        )
    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError)) or any(words in first_line for words in _LOST):
        return PeerError(f"the connection to another rank was lost (it was killed, or its node is gone): {first_line}")
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
    timeout = timedelta(seconds=run.timeout)
    # The store first: it is what ranks wait on while rank 0 works alone. With torchrun it is the agent's, and outlives the ranks.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=_FORMING_SECONDS)))
        store.set_timeout(timeout)
        dist.init_process_group(
            backend, store=dist.PrefixStore("dist_train", store), rank=rank, world_size=world_size, timeout=timeout
        )
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        first_line = str(error).partition("\n")[0]
        raise SetupError(
            f"the {world_size} ranks did not meet at {where}: {first_line}",
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


def resolve_threads(requested: int | Literal["auto"], world: World) -> int:
    """Threads of each rank: as asked, or the node's usable cores shared out."""
    if requested != "auto":
        return requested
    return world.share_of_cores()
