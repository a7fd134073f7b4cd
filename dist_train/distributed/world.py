"""The ranks of a run and their collectives, waits on the store, and failure reports."""

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
from dist_train.distributed.watchdog.heartbeat import VERDICT_SECONDS, Heartbeat, Phase
from dist_train.distributed.watchdog.stop_signals import StopRequest
from dist_train.errors import ForeignError, PeerError, SetupError

T = TypeVar("T")
_NO, _YES = 1.25, 2.5  # numbers that a collective of a user's own is unlikely to have
FAREWELL_SECONDS = 5.0  # how long rank 0 keeps the store it hosts open for the other ranks at the end


_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True)
class Reducing:
    """An all-reduce under way, of `World.start_all_reduce`."""

    tensor: torch.Tensor
    work: dist.Work | None
    heartbeat: Heartbeat

    def wait(self) -> torch.Tensor:
        """Waits for the other ranks (on CUDA: lets the device wait) and returns the reduced tensor."""
        if self.work is not None:
            with self.heartbeat.within("collective"):
                self.work.wait()
        return self.tensor


@dataclass
class World:
    """The ranks of one run, one process each.

    Attributes:
        rank: 0 .. world_size - 1 over all nodes.
        local_rank: 0 .. local_world_size - 1 on this node.
        device: the device of this rank's model.
        timeout: seconds after which a wait for another rank fails, unless the watchdog ends the run before.
        nonce: random prefix of the store's keys, agreed at start, so that keys of an earlier attempt are never read.
        store: the process group's store; None with one rank, or once it no longer answers.
        heartbeat: progress record that the watchdog reads.
        stop: records whether this rank was asked to stop. The ranks agree on it before any of them stops.
        failing: True once work beside the loop has failed. The ranks then stop as if one was asked to, and learn why.
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
    failing: bool = False
    _waits: int = 0

    @property
    def node_rank(self) -> int:
        return self.rank // self.local_world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def cores(self) -> int:
        """Number of usable CPU cores of this node, shared by its ranks."""
        return len(os.sched_getaffinity(0))

    def share_of_cores(self) -> int:
        """Returns this rank's share of the node's usable cores, at least one."""
        return max(1, self.cores // self.local_world_size)

    def all_reduce(self, tensor: torch.Tensor, operation: Literal["sum", "max"]) -> torch.Tensor:
        """Reduces `tensor` over all ranks in place and returns it. Collective."""
        if self.world_size > 1:
            with self.heartbeat.within("collective"):
                dist.all_reduce(tensor, op=_OPERATIONS[operation])
        return tensor

    def start_all_reduce(self, tensor: torch.Tensor, operation: Literal["sum", "max"]) -> Reducing:
        """Starts to reduce `tensor` over all ranks in place; it may not be touched before `wait`. Collective."""
        work = dist.all_reduce(tensor, op=_OPERATIONS[operation], async_op=True) if self.world_size > 1 else None
        return Reducing(tensor, work, self.heartbeat)

    def gather(self, value: T) -> list[T]:
        """Returns every rank's value, in rank order. Pickles the values, so use it for small ones only. Collective."""
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

        They wait on the store, not in a collective, so work may take longer than the process group's timeout (law 4).

        Args:
            what: names the work in the error message.
            deadline: seconds after which the waiting ranks give up; None: `timeout`.
            phase: shown by the watchdog while rank 0 works.

        Raises:
            PeerError: on the waiting ranks, if the work failed or took longer than `deadline`.
        """
        return self._on_leader(0, work, what, deadline, phase)

    def first_on_node(self, work: Callable[[], T], what: str, deadline: float | None = None) -> T:
        """Runs `work` once per node, on its local rank 0; otherwise like `on_rank_0`."""
        return self._on_leader(self.rank - self.local_rank, work, what, deadline, "set-up")

    def _on_leader(self, leader: int, work: Callable[[], T], what: str, deadline: float | None, phase: Phase) -> T:
        # Without a `deadline`, the watchdog's timeout applies, except during set-up, which gets `timeout`.
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
        # When both time out together, the watchdog's error should come first: it names the phase of each rank.
        watched = 0 < self.heartbeat.limit <= deadline
        self._wait(key, leader, what, deadline + VERDICT_SECONDS if watched else deadline)
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
            "raise the stage's `deadline`, or check what that rank is doing",
        )

    def stop_wanted(self) -> bool:
        """Tells whether this rank wants all to stop.

        It was asked to, by a signal or by its watcher (which sees the file STOP), or it is `failing`.
        """
        if not self.stop.requested and self.heartbeat.stop_reason:
            self.stop.ask(self.heartbeat.stop_reason)
        return self.stop.requested or self.failing

    def stop_agreed(self) -> bool:
        """Tells whether any rank was asked to stop. Collective; a training step carries the flag in its reduction.

        Raises:
            SetupError: what came back is no answer: another rank calls another collective.
        """
        wanted = torch.full((1,), _YES if self.stop_wanted() else _NO, device=self.device)
        answer = float(self.all_reduce(wanted, "max"))
        if answer not in (_YES, _NO):
            raise SetupError(
                "the ranks call different collectives: a model, a dataset or a task calls one on some ranks only",
                "call it on all ranks, or on none; --debug.collectives true names the call",
            )
        return answer == _YES

    def asked(self, question: Callable[[], T], seconds: float | None = None) -> T:
        """Calls `question`, which reads the store, in a thread, and returns its result.

        If the store's node vanishes without closing the connection, torch's client ignores its timeout and waits for
        TCP's, which can take many minutes.

        Args:
            seconds: limit of the wait; None: `timeout`.

        Raises:
            PeerError: no answer in time. `store` is then set to None, so later calls do not wait again.
        """
        answers: Queue[Future[T]] = Queue()
        Thread(target=lambda: answers.put(outcome(question)), daemon=True).start()
        try:
            return answers.get(timeout=self.timeout if seconds is None else seconds).result()
        except Empty:
            self.store = None
            raise PeerError(
                "the store of the ranks' process group does not answer: its node is gone, or the network is down",
                "start again; torchrun with --restarts does so by itself",
            ) from None

    def barrier(self, what: str) -> None:
        """Waits until every rank has called it."""
        if self.world_size > 1:
            self.all_reduce(torch.zeros(1, device=self.device), "sum")
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def report_failure(self, error: BaseException) -> None:
        """Tells the other ranks why this one fails; only the first report is kept.

        Ignores errors of the store, so that the original error stays visible.
        """
        if self.store is None:
            return
        try:
            if self.store.add(f"{self.nonce}/failures", 1) == 1:
                self.store.set(f"{self.nonce}/failure", json.dumps({"rank": self.rank, "error": _in_a_line(error)}))
        except RuntimeError:
            return  # the process that hosts the store has ended

    def peer_failure(self) -> dict[str, Any] | None:
        """Returns the first reported failure, {"rank", "error"}; None if there is none or it is this rank's own."""
        if self.store is None:
            return None
        try:
            if self.store.check([f"{self.nonce}/failure"]):
                report: dict[str, Any] = json.loads(self.store.get(f"{self.nonce}/failure"))
                return report if report["rank"] != self.rank else None
        except RuntimeError:  # the process that hosts the store has ended
            return None
        return None

    def raise_peer_failure(self) -> None:
        failure = self.peer_failure()
        if failure is not None:
            raise PeerError(f"rank {failure['rank']} failed: {failure['error']}")

    def take_leave(self) -> None:
        """Signs off from the store. If rank 0 hosts it, rank 0 waits until the other ranks have signed off."""
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
            return  # the process that hosts the store has ended


def outcome(question: Callable[[], T]) -> Future[T]:
    """Returns a future with the result of `question`, or with the error it raised."""
    found: Future[T] = Future()
    try:
        found.set_result(question())
    except BaseException as error:  # raised in the thread that reads the future
        found.set_exception(error)
    return found


def _in_a_line(error: BaseException) -> str:
    if isinstance(error, PeerError):
        return str(error)
    if isinstance(error, ForeignError):
        return error.message
    return "".join(traceback.format_exception_only(error)).strip()


def resolve_threads(requested: int | Literal["auto"], world: World) -> int:
    """Returns the number of CPU threads of this rank; `auto`: its share of the node's cores."""
    if requested != "auto":
        return requested
    return world.share_of_cores()
