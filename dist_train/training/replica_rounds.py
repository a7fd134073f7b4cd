"""Brings the loop the batches of a replica under `strategy: ft`: its share of each step among those that take part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dist_train.config.load import differences
from dist_train.config.tree import Config
from dist_train.data.loader import StepBatch, TrainLoader
from dist_train.errors import ConfigError, DataError
from dist_train.run_dir.ledger import NoLedger
from dist_train.run_dir.replica_ledger import ReplicaLedger
from dist_train.strategies.ft import FT
from dist_train.training.rounds import Rounds
from dist_train.training.state import TrainState


class ReplicaRounds(Rounds):
    """Rounds of replicas that come and go.

    A step of which a replica was lost is done again by the others, from the same state, on the same global batch. One
    that comes late takes up the others' state, and goes on with their step.

    Args:
        fingerprint: of the training data, which all replicas must have.
        say: tells people how many replicas there are, and what is done again.
    """

    def __init__(
        self,
        stage: str,
        config: Config,
        loader: TrainLoader,
        steps_per_epoch: int,
        strategy: FT,
        ledger: ReplicaLedger | NoLedger,
        fingerprint: str,
        say: Callable[[str], None],
    ) -> None:
        self._stage, self._config, self._fingerprint = stage, config, fingerprint
        self._loader, self._steps = loader, steps_per_epoch
        self._strategy, self._ledger = strategy, ledger
        self._say, self._ranks = say, 0
        self._kept: dict[str, torch.Tensor] = {}
        self._moved = self._stopped = False

    def begin(self, state: TrainState) -> None:
        self._state = state
        self._strategy.meet(state.step, self._sent, self._take, lambda line: self._say(f"{self._stage}: {line}"))

    def batches(self, epoch: int, first: int) -> Iterator[StepBatch]:
        drawn: Iterator[StepBatch] | None = None
        held: tuple[int, int, int] | None = None  # the place, ranks and rank that `drawn` yields next
        while self._state.step < (epoch + 1) * self._steps:
            seat = self._strategy.take_seat()
            if seat is None:
                self._stopped = True
                return
            if self._moved:
                return  # the seat stays
            step = self._state.step
            if seat.ranks != self._ranks:
                self._ranks = seat.ranks
                self._say(f"{self._stage}: {seat.ranks} replica{'s' * (seat.ranks > 1)} from step {step} on")
            wanted = (step - epoch * self._steps, seat.ranks, seat.rank)
            if drawn is None or held != wanted:
                self._loader.share_as(seat.ranks, seat.rank)
                drawn = self._loader.epoch(epoch, wanted[0], self._steps)
            batch = next(drawn)
            held = (wanted[0] + 1, seat.ranks, seat.rank)
            # Before the gradients travel: the others may have them, and this process may be killed at once.
            self._ledger.announce(self._stage, epoch, step, batch.ids, batch.left_out, seat.ranks, seat.trial)
            self._kept = {name: each.clone() for name, each in self._state.model.named_buffers()}
            yield batch

    def counts(self) -> bool:
        if self._strategy.commits():
            return True
        reason = self._strategy.trouble or "another replica failed"
        self._say(f"{self._stage}: step {self._state.step} is done again: {reason}")
        with torch.no_grad():
            for name, buffer in self._state.model.named_buffers():
                buffer.copy_(self._kept[name])
        for parameter in self._state.parameters:
            parameter.grad = None
        return False

    def moved(self) -> bool:
        moved, self._moved = self._moved, False
        return moved

    def stopped(self) -> bool:
        return self._stopped

    def end(self) -> None:
        self._strategy.leave(farewell=True)

    def leave(self) -> None:
        self._strategy.leave(farewell=False)

    def _sent(self) -> dict[str, Any]:
        """Returns what another replica needs; copies, as it reads them while this one goes on."""
        return {
            "config": self._config.model_dump(mode="json"),
            "data": self._fingerprint,
            "state": copy.deepcopy(self._state.state_dict()),
        }

    def _take(self, sent: dict[str, Any]) -> None:
        """Takes up another replica's state.

        Raises:
            ConfigError: it has other settings that determine the result.
            DataError: it has other data.
        """
        changed = differences(sent["config"], self._config)
        if changed:
            raise ConfigError(changed, "the other replicas have other settings: start all with the same")
        if sent["data"] != self._fingerprint:
            raise DataError(
                f"the dataset {self._config.data.name} is another than that of the other replicas",
                "give each replica the same data",
            )
        before = self._state.step
        self._state.load_state_dict(sent["state"])
        if self._state.step != before:
            self._say(f"{self._stage}: goes on with the others' step {self._state.step}, from {before}")
        self._moved = True
