"""Saves and loads a run's checkpoints: at steps within a stage, and at its end."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from dist_train.config.tree import Config
from dist_train.distributed.world import World
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.ledger import Ledger, NoLedger
from dist_train.run_dir.retention import Retention
from dist_train.trackers.base import Trackers


class StageCheckpoints:
    """Saves and loads the state that a resumed run needs; implements the loop's `Checkpoints`.

    Attributes:
        finished: maps each finished stage to the name of the checkpoint at its end.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        config: Config,
        world: World,
        ledger: Ledger | NoLedger,
        trackers: Trackers,
        describe: Callable[[], dict[str, Any]],
    ) -> None:
        """describe: returns the run's record that each checkpoint holds beside the stage's state; called on rank 0."""
        self.finished: dict[str, str] = {}
        self._folder, self._config, self._world = folder, config, world
        self._ledger, self._trackers, self._describe = ledger, trackers, describe
        self._retention = Retention(config.checkpoint.keep)

    def newest(self) -> dict[str, Any] | None:
        """Loads the newest checkpoint and continues from it; returns None if there is none."""
        name = self._folder.latest
        if name is None:
            return None
        found: dict[str, Any] = self._folder.load(name)
        self.finished = dict(found["finished_stages"])
        self._retention.restore(found["retention"])
        return found

    def product(self, stage: str) -> dict[str, Any]:
        """Returns the product of a finished stage."""
        product: dict[str, Any] = self._folder.load(self.finished[stage])["payload"]
        return product

    def keep_ends(self) -> None:
        """Removes all checkpoints but the stages' ends; a kill may have left older ones behind."""
        self._folder.keep_only(set(self.finished.values()))

    def save_step(
        self, stage: str, step: int, state: dict[str, Any], best_first: Sequence[int], needed: int | None
    ) -> None:
        # Before and after its evaluation, the same step has two names: the first checkpoint stays valid meanwhile.
        name = self._step_name(stage, step) + ("-open" if state["epoch_open"] else "")
        best = [self._step_name(stage, each) for each in best_first]
        kept = {name} if needed is None else {name, self._step_name(stage, needed)}

        def choose(names: Sequence[str]) -> set[str]:
            by_age = [each for each in names if re.fullmatch(rf"{re.escape(stage)}-\d+", each)]
            return self._retention.choose(by_age, best, kept)

        self._save(name, {"stage": stage, "finished": False, "payload": state}, choose)

    def load_step(self, stage: str, step: int) -> dict[str, Any]:
        payload: dict[str, Any] = self._folder.load(self._step_name(stage, step))["payload"]
        return payload

    def save_stage(self, stage: str, product: dict[str, Any]) -> None:
        """Saves the end of a stage, with its product. Collective."""
        name = f"{stage}-end"
        self.finished[stage] = name
        self._save(name, {"stage": stage, "finished": True, "payload": product}, lambda names: {name})

    @staticmethod
    def _step_name(stage: str, step: int) -> str:
        return f"{stage}-{step:08d}"

    def _save(self, name: str, state: dict[str, Any], choose: Callable[[Sequence[str]], set[str]]) -> None:
        """Writes the ledger on every rank, then the checkpoint that covers it on rank 0, while the others wait."""
        self._ledger.sync()
        if self._config.debug.ledger:
            self._world.barrier("ledger")

        def write() -> None:
            self._trackers.sync()
            record = {"finished_stages": self.finished, "retention": self._retention.note(state["stage"], name)}
            self._folder.save(name, {**state, **self._describe(), **record})
            self._folder.keep_only({*choose(self._folder.names()), *self.finished.values()})

        self._world.on_rank_0(write, f"saving the checkpoint {name}", phase="save")
