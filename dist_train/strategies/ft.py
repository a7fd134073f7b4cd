"""Trains as one of several replicas that come and go without a restart, by torchft's Manager over gloo.

A replica is a world of one process. Before each step the replicas meet at the lighthouse, which says how many take part
and which of them this one is. Gradients and the step's sums travel in one tensor, as sums: each replica has divided its
losses by the global count. Where a replica is lost meanwhile, nobody's step counts, and the others do it again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_train.cluster.replicas import LIGHTHOUSE, TIMEOUT, replica_number
from dist_train.errors import PeerError, SetupError
from dist_train.strategies.base import Strategy, Summed
from dist_train.trees import Tree

# Its Rust part reads the variable once; it tells several lines a step.
os.environ.setdefault("RUST_LOG", "error")
from torchft import Manager, ProcessGroupGloo

_PEER_SECONDS = 60.0  # until a replica that does not answer counts as lost
_FAREWELL_SECONDS = 30.0
_LIGHTHOUSE_TRIES = 1000  # a lighthouse that has died may start again; without a number, nobody would find it
_TOLD_AFTER = 10.0  # seconds of a wait for the others
_POLL_SECONDS = 0.2
_HINT = f"torchft_lighthouse --min_replicas 1, on one machine; {LIGHTHOUSE}=http://HOST:29510 on each"


@dataclass(frozen=True)
class Seat:
    """A replica's part in one trial of a step.

    Attributes:
        rank, ranks: which one it is, of how many that take part.
        trial: a name of the trial's group, the same on all that take part in it.
    """

    rank: int
    ranks: int
    trial: str


class _Group(ProcessGroupGloo):
    """torchft's gloo group, which remembers a name of its members' meeting.

    Attributes:
        meeting: differs from that of any other group of this run: it is made of a store's address, with a port, and of
            the quorum's number there.
        members: how many have met.
    """

    meeting = ""
    members = 0

    def configure(self, store_addr: str, replica_id: str, rank: int, world_size: int, *rest: Any, **named: Any) -> None:
        self.meeting, self.members = hashlib.sha256(store_addr.encode()).hexdigest()[:12], world_size
        super().configure(store_addr, replica_id, rank, world_size, *rest, **named)


class _Stopped(Exception):
    """This replica was asked to stop while it waited for the others."""


class _Daemons(Executor):
    """Calls in threads that do not hold up the process's end: one that waits for a lighthouse cannot be called off."""

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            try:
                future.set_result(call(*arguments, **named))
            except BaseException as error:
                future.set_exception(error)

        Thread(target=work, daemon=True).start()
        return future


class _Manager(Manager):
    """torchft's Manager, whose wait for the others looks up now and then.

    Attributes:
        look_up: called several times a second of the wait with its seconds so far; what it raises ends the wait.
    """

    look_up: Callable[[float], None] | None = None
    _executor: Executor

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self._executor.shutdown(wait=False)
        self._executor = _Daemons()

    def wait_quorum(self) -> None:
        begin, future = time.monotonic(), self._quorum_future
        while self.look_up is not None and future is not None and not wait([future], _POLL_SECONDS).done:
            self.look_up(time.monotonic() - begin)
        super().wait_quorum()


class FT(Strategy):
    """Sums gradients over the replicas that take part in a step. `meet` comes before the first step.

    Without it, as where a finished run is evaluated, this is one process alone.

    Attributes:
        trouble: why the last trial of a step came to nothing, in a line.
    """

    trouble = ""
    _manager: _Manager | None = None
    _seat: Seat | None = None
    _values: Tensor | None = None

    @property
    def several(self) -> bool:
        return self._manager is not None

    @property
    def leaves_alone(self) -> bool:
        return True

    @property
    def rank(self) -> int:
        return self.world.rank if self._seat is None else self._seat.rank

    def wrap(self, model: nn.Module) -> nn.Module:
        self._learned = [each for each in model.parameters() if each.requires_grad]
        return model

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()  # only the last backward of a step sums, as it has the values

    def warm_up_buckets(self, wrapped: nn.Module, inputs: Tree) -> None:
        return

    def meet(
        self, step: int, state: Callable[[], Any], load: Callable[[Any], None], say: Callable[[str], None]
    ) -> None:
        """Joins the replicas of this run.

        Args:
            step: number of steps that this replica has done.
            state: returns what another replica needs to go on from here; called while this one waits.
            load: takes up another replica's state; called within `take_seat`.
            say: tells people of a wait that takes long.

        Raises:
            SetupError: nobody answers where the lighthouse should be, or this machine's name is no address.
        """
        logger = logging.getLogger("torchft")
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)  # what matters of a lost replica is said here, without tracebacks
        seconds = float(os.environ.get(TIMEOUT, _PEER_SECONDS))
        peers, host = timedelta(seconds=seconds), socket.gethostname()
        try:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        except (RuntimeError, OSError) as error:
            raise SetupError(
                f"the name of this machine, {host}, is no address by which replicas can reach it",
                f"add it to /etc/hosts, so that `getent hosts {host}` tells its address",
            ) from error
        self._group = _Group(timeout=peers)
        try:
            self._manager = _Manager(
                pg=self._group,
                load_state_dict=load,
                state_dict=state,
                min_replica_size=1,
                use_async_quorum=False,  # a step's rows follow from its seats, so these are known before it
                init_sync=True,
                replica_id=f"replica-{replica_number(os.environ) or 0}",
                store_addr=host,
                store_port=self._store.port,
                rank=0,
                world_size=1,
                timeout=peers,
                quorum_timeout=timedelta(seconds=self.world.timeout),
                connect_timeout=peers,
                quorum_retries=_LIGHTHOUSE_TRIES,
            )
        except (RuntimeError, OSError) as error:
            raise SetupError(f"{_lighthouse()} does not answer: {_line(error)}", _HINT) from error
        self._say, self._manager.look_up = say, self._look_up
        self._manager.load_state_dict({"step": step, "batches_committed": 0})

    def take_seat(self) -> Seat | None:
        """Waits for the others and returns this replica's part in the next trial; the same one until `commits`.

        None if this replica is asked to stop meanwhile. Where the others are ahead, their state is loaded by then.

        Raises:
            PeerError: the lighthouse no longer answers, or too few replicas are there for `run.timeout`.
        """
        assert self._manager is not None, "meet() comes first"
        if self._seat is None:
            self._told = False
            with self.world.heartbeat.within("waiting", at_least=self.world.timeout):
                try:
                    self._manager.start_quorum()
                except _Stopped:
                    return None
                except (RuntimeError, TimeoutError) as error:
                    message = f"{_lighthouse()} does not answer, or too few replicas are there: {_line(error)}"
                    raise PeerError(message, f"{_HINT}; then the same command goes on") from error
            rank = self._manager.participating_rank()
            assert rank is not None, "all replicas take part after a quorum that is waited for"
            if self._group.members != self._manager.num_participants():
                # A lighthouse that starts again counts from 1 again, and Manager keeps a group of the same number.
                self._manager.report_error(RuntimeError("the lighthouse has started again"))
            trial = f"{self._group.meeting}-{self._manager.current_step()}"
            self._seat = Seat(rank, self._manager.num_participants(), trial)
        return self._seat

    def _look_up(self, seconds: float) -> None:
        if self.world.stop_wanted():
            raise _Stopped
        if seconds > _TOLD_AFTER and not self._told:
            self._told = True
            limit = f"{self.world.timeout:g} s"
            self._say(f"waits, up to {limit}: {_lighthouse()} does not answer, or waits for more replicas")

    def commits(self) -> bool:
        """Tells whether the step's sums are whole; else it is to be done again, with a new seat."""
        assert self._manager is not None and self._seat is not None
        with self.world.heartbeat.within("collective"):
            whole: bool = self._manager.should_commit()
        error = self._manager.errored()
        self.trouble = "" if error is None else _line(error.original_exception)
        self._seat = None
        return whole

    def leave(self, *, farewell: bool) -> None:
        """Leaves the others.

        farewell: this replica has done all steps: one that failed in the last of them, or has come late, is given the
            state first.
        """
        manager, self._manager = self._manager, None
        if manager is None:
            return
        if farewell:
            with self.world.heartbeat.within("waiting", at_least=self.world.timeout), suppress(Exception):
                if self._seat is None:
                    manager.start_quorum(timeout=timedelta(seconds=_FAREWELL_SECONDS))
                manager.allreduce(torch.zeros(1)).wait()  # until those have the state
        self._seat = None
        manager.shutdown(wait=False)

    def summed_in_backward(self, loss: Tensor, values: Tensor) -> tuple[Tensor, Summed]:
        self._values = values
        return loss, lambda: values

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        values, self._values = self._values, None
        if values is not None and self._manager is not None:
            self._sum(self._manager, values)

    @torch.no_grad()
    def _sum(self, manager: _Manager, values: Tensor) -> None:
        """Sums gradients and values over the replicas, in place. A parameter that none of them used keeps no gradient.

        What is summed after a loss is worth nothing; `commits` tells.
        """
        used = torch.tensor([float(each.grad is not None) for each in self._learned], device=values.device)
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in self._learned]
        pieces = [values, used, *gradients]
        flat = torch.cat([piece.float().flatten() for piece in pieces]).cpu()
        with self.world.heartbeat.within("collective"):
            manager.allreduce(flat, reduce_op=dist.ReduceOp.SUM).wait()
            if manager.errored():
                self._group.abort()  # so that those who wait for this replica, and not for the lost one, fail at once
        sums = flat.to(values.device).split([piece.numel() for piece in pieces])
        for piece, total in zip(pieces, sums, strict=True):
            piece.copy_(total.view_as(piece))
        for parameter, gradient, count in zip(self._learned, gradients, used.tolist(), strict=True):
            parameter.grad = gradient if count else None


def _lighthouse() -> str:
    return f"torchft's lighthouse at {os.environ.get(LIGHTHOUSE)}"


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
