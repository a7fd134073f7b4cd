"""The ranks of a run, and what they do together."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, Queue
from threading import Thread
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from dist_train.distributed.polling import attempts
from dist_train.distributed.watchdog.heartbeat import Heartbeat, Phase
from dist_train.distributed.watchdog.stop_signals import StopRequest
from dist_train.errors import PeerError

T = TypeVar("T")
_WATCHDOG_SECONDS = 20.0  # from finding that a rank is stuck to the end of the run
FAREWELL_SECONDS = 5.0  # for which rank 0, where it hosts the store, lets the others read it at the end


@dataclass
class World:
    """The ranks of one run, one process each.

    Attributes:
        rank: 0 .. world_size - 1 over all nodes.
        local_rank: 0 .. local_world_size - 1 on this node.
        device: where this rank's model lives.
        timeout: seconds after which a wait for another rank fails.
        nonce: agreed at the start, so that keys of an earlier attempt in the same store are never read.
        heartbeat: kept up for the watchdog.
        stop: whether this rank was asked to stop; the ranks agree on what follows.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout: float = 1800.0
    nonce: str = ""
    store: dist.Store | None = None
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    stop: StopRequest = field(default_factory=StopRequest)
    _waits: int = 0

    @property
    def node_rank(self) -> int:
        return self.rank // self.local_world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cores(self) -> int:
        """The number of usable cores of this node, which its ranks share."""
        return len(os.sched_getaffinity(0))

    def share_of_cores(self) -> int:
        """Returns this rank's share of the node's usable cores, at least one."""
        return max(1, self.cores // self.local_world_size)

    def all_reduce(self, tensor: torch.Tensor, operation: Literal["sum", "max"]) -> torch.Tensor:
        """Reduces `tensor` over all ranks, in place; returns it."""
        if self.world_size > 1:
            with self.heartbeat.within("collective"):
                dist.all_reduce(tensor, op=dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Returns each rank's value, by rank. For small values and rare occasions. Collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self.heartbeat.within("collective"):
            dist.all_gather_object(values, value)
        return values

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Returns rank 0's bytes on every rank; the others pass None. Collective."""
        if self.world_size == 1:
            assert data is not None
            return data
        device = self.device if dist.get_backend() == "nccl" else torch.device("cpu")
        size = torch.tensor([len(data) if data is not None else 0], device=device)
        with self.heartbeat.within("collective"):
            dist.broadcast(size, src=0)
            buffer = (
                torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
                if data
                else torch.empty(int(size), dtype=torch.uint8, device=device)
            )
            dist.broadcast(buffer, src=0)
        return buffer.cpu().numpy().tobytes()

    def on_rank_0(self, work: Callable[[], T], what: str, deadline: float | None = None, phase: Phase = "set-up") -> T:
        """Runs `work` on rank 0 alone; the others wait for its JSON-serializable result.

        They wait on the store, not in a collective: work longer than the process group's timeout kills nobody (law 4).

        Raises:
            PeerError: on the waiting ranks, if the work failed or took longer than `deadline` seconds; None: `timeout`.
        """
        return self._on_leader(0, work, what, deadline, phase)

    def first_on_node(self, work: Callable[[], T], what: str, deadline: float | None = None) -> T:
        """Runs `work` as `on_rank_0` does, but once on each node, on its local rank 0."""
        return self._on_leader(self.rank - self.local_rank, work, what, deadline, "set-up")

    def _on_leader(self, leader: int, work: Callable[[], T], what: str, deadline: float | None, phase: Phase) -> T:
        # Only a deadline of its own lets the work take longer than the watchdog's timeout.
        with self.heartbeat.within(
            phase if self.rank == leader else "waiting", at_least=deadline or self._patience(phase)
        ):
            return self._led(leader, work, what, self.timeout if deadline is None else deadline)

    def _patience(self, phase: Phase) -> float:
        return self.timeout if phase == "set-up" else 0.0

    def _led(self, leader: int, work: Callable[[], T], what: str, deadline: float) -> T:
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
        # The watchdog, if it looks at the same moment, speaks first: it knows more.
        watched = 0 < self.heartbeat.limit <= deadline
        self._wait(key, leader, what, deadline + _WATCHDOG_SECONDS if watched else deadline)
        received = json.loads(self.asked(partial(self.store.get, key)))
        if "error" in received:
            raise PeerError(f"rank {leader} failed: {received['error']}")
        value: T = received["value"]
        return value

    def _wait(self, key: str, leader: int, what: str, deadline: float) -> None:
        assert self.store is not None
        for _ in attempts(deadline):
            if self.asked(partial(self.store.check, [key])):
                return
            self.asked(self.raise_peer_failure)
        raise PeerError(
            f"rank {leader} did not finish ({what}) within {deadline:g} s",
            "raise the stage's `deadline`, or look at what that rank does",
        )

    def stop_wanted(self) -> bool:
        """Tells whether this rank was asked to stop: by a signal, or by its watcher (the file STOP)."""
        if not self.stop.requested and self.heartbeat.stop_reason:
            self.stop.ask(self.heartbeat.stop_reason)
        return self.stop.requested

    def stop_agreed(self) -> bool:
        """Tells whether any rank was asked to stop. Collective; for rare occasions."""
        wanted = torch.full((1,), float(self.stop_wanted()), device=self.device)
        return bool(self.all_reduce(wanted, "max"))

    def asked(self, question: Callable[[], T], seconds: float | None = None) -> T:
        """Asks the store in a thread, and returns its answer.

        Where the store's node is gone without a word, torch's client waits as long as TCP allows, whatever its timeout.

        Args:
            seconds: how long to wait for an answer; None: `timeout`.

        Raises:
            PeerError: no answer came. The store is then given up: nothing more is asked.
        """
        answers: Queue[Future[T]] = Queue()
        Thread(target=lambda: answers.put(_outcome(question)), daemon=True).start()
        try:
            return answers.get(timeout=self.timeout if seconds is None else seconds).result()
        except Empty:
            self.store = None
            raise PeerError(
                "the store of the ranks' process group does not answer: its node is gone, or the network is down",
                "start again; torchrun with --restarts does so by itself",
            ) from None

    def barrier(self, what: str) -> None:
        """Waits until every rank is here."""
        if self.world_size > 1:
            self.all_reduce(torch.zeros(1, device=self.device), "sum")
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def report_failure(self, error: BaseException) -> None:
        """Tells the other ranks why this one ends; the first report counts. Never raises: the error matters more."""
        if self.store is None:
            return
        try:
            if self.store.add(f"{self.nonce}/failures", 1) == 1:
                self.store.set(f"{self.nonce}/failure", json.dumps({"rank": self.rank, "error": _in_a_line(error)}))
        except RuntimeError:
            return  # the store died with the rank or agent that held it

    def peer_failure(self) -> dict[str, Any] | None:
        """Returns the first failure that another rank reported: its "rank" and "error"."""
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
        """Uses the store for the last time: rank 0, where its process holds it, waits until the others have read it."""
        if self.store is None:
            return
        try:
            if self.rank != 0:
                self.store.add(f"{self.nonce}/gone", 1)
            elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                for _ in attempts(FAREWELL_SECONDS, longest_pause=0.01):
                    if self.store.add(f"{self.nonce}/gone", 0) >= self.world_size - 1:
                        return
        except RuntimeError:
            return  # as above


def _outcome(question: Callable[[], T]) -> Future[T]:
    """Returns the question's answer, or the error that it raised."""
    outcome: Future[T] = Future()
    try:
        outcome.set_result(question())
    except BaseException as error:  # raised where the answer is taken
        outcome.set_exception(error)
    return outcome


def _in_a_line(error: BaseException) -> str:
    if isinstance(error, PeerError):
        return str(error)
    return "".join(traceback.format_exception_only(error)).strip()


def resolve_threads(requested: int | Literal["auto"], world: World) -> int:
    """Returns the threads of each rank: as requested, or its share of the node's cores."""
    if requested != "auto":
        return requested
    return world.share_of_cores()
