"""Saves and loads a run's checkpoints: at steps within a stage, and at its end.

A save at a step goes on beside the loop, unless `checkpoint.asynchronous` is false. Rank 0 copies the state and starts
a thread that writes the copy; the other ranks copy nothing and wait for nothing. One save is in flight at most: the
next one waits for it on rank 0. Whatever fails in it is kept, and makes rank 0 want to stop. So all ranks stop at the
next step, as if one was asked to, and wait for the save, which raises the error on all of them.

Of a state in shards (DTensors) each rank copies and writes its own, beside the loop too. Rank 0 waits in its thread
until all have reported theirs, then makes the checkpoint of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from dist_train.config.tree import Config
from dist_train.distributed.reports import Reports
from dist_train.distributed.world import World
from dist_train.errors import STOPS
from dist_train.run_dir.background import Background, Beat
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.ledger import Ledger, NoLedger
from dist_train.run_dir.replica_ledger import ReplicaLedger
from dist_train.run_dir.retention import Retention
from dist_train.run_dir.retry import retried, told
from dist_train.run_dir.saved import Moment
from dist_train.run_dir.shards import holds_shards
from dist_train.run_dir.snapshot import Owner, StateBuffer, take
from dist_train.run_dir.staging import Staged
from dist_train.trackers.base import Trackers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
        ledger: Ledger | ReplicaLedger | NoLedger,
        trackers: Trackers,
        describe: Callable[[], dict[str, Any]],
        mesh: DeviceMesh | None = None,
    ) -> None:
        """
        Args:
            describe: returns the run's record that each checkpoint holds beside the stage's state; called on rank 0.
            mesh: what checkpoints hold in shards is loaded in shards over it; None: whole.
        """
        self.finished: dict[str, str] = {}
        self._folder, self._config, self._world = folder, config, world
        self._ledger, self._trackers, self._describe = ledger, trackers, describe
        self._retention = Retention(config.checkpoint.keep)
        self._buffer = StateBuffer()
        self._background = Background(self._note_failure)
        self._in_flight: str | None = None
        self._sharded_saves = 0
        self._mesh = mesh
        self._publish: Callable[[Beat], None] = lambda beat: None

    def published_by(self, publish: Callable[[Beat], None]) -> None:
        """Has `publish` called on rank 0 after each checkpoint, before the next one is begun."""
        self._publish = publish

    def newest(self) -> dict[str, Any] | None:
        """Loads the newest checkpoint and continues from it; returns None if there is none."""
        name = self._folder.latest
        if name is None:
            return None
        found: dict[str, Any] = self._folder.load(name, self._mesh)
        self.finished = dict(found["finished_stages"])
        self._retention.restore(found["retention"])
        return found

    def product(self, stage: str) -> dict[str, Any]:
        """Returns the product of a finished stage."""
        product: dict[str, Any] = self._folder.load(self.finished[stage], self._mesh)["payload"]
        return product

    def keep_ends(self) -> None:
        """Removes all checkpoints but the stages' ends; a kill may have left older ones behind."""
        self._folder.keep_only(set(self.finished.values()), copies=False)

    def save_step(
        self, stage: str, step: int, state: dict[str, Any], best_first: Sequence[int], needed: int | None
    ) -> None:
        # Before and after its evaluation, the same step has two names: the first checkpoint stays valid meanwhile.
        name = str(Moment(stage, step, state["epoch_open"]))
        best = [str(Moment(stage, each)) for each in best_first]
        base = None if needed is None else str(Moment(stage, needed))
        kept = {name} if base is None else {name, base}

        def choose(names: Sequence[str]) -> set[str]:
            return self._retention.choose(_by_age(stage, names), best, kept)

        # The later ones need the best so far, as they need stages' ends.
        content = {"stage": stage, "finished": False, "payload": state}
        self._save(name, content, choose, base, base == name, self._config.checkpoint.asynchronous)

    def settle(self) -> None:
        """Waits for the save in flight, if there is one. Collective.

        Raises:
            CheckpointError: it failed on this rank; PeerError on the others.
        """
        name, self._in_flight = self._in_flight, None
        if name is not None:
            if not self._world.is_main:
                self._background.wait(self._beat)  # its own shards, if it has any
            self._world.on_rank_0(lambda: self._background.wait(self._beat), _what(name), phase="save")

    def close(self, say: Callable[[str], None]) -> None:
        """Ends a save in flight as the run fails, so that it is not lost while it makes progress; says if it fails."""
        name, self._in_flight = self._in_flight, None
        if name is not None:
            error = self._background.leave(self._beat)
            if error is not None and self._world.is_main:
                say(f"the checkpoint {name} is not saved: {error}")

    def load_step(self, stage: str, step: int) -> dict[str, Any]:
        self.settle()
        payload: dict[str, Any] = self._folder.load(str(Moment(stage, step)), self._mesh)["payload"]
        return payload

    def save_stage(self, stage: str, product: dict[str, Any]) -> None:
        """Saves the end of a stage, with its product. Collective.

        It is saved twice, as all later checkpoints need it. The stage's last checkpoint within stays until the next one
        is saved, so that there always is an older one.
        """
        self.settle()
        self._buffer.release()
        name = str(Moment(stage, None))
        self.finished[stage] = name

        def choose(names: Sequence[str]) -> set[str]:
            return {name, *self._retention.at_end(_by_age(stage, names))}

        self._save(name, {"stage": stage, "finished": True, "payload": product}, choose, None, True, False)

    def _save(
        self,
        name: str,
        state: dict[str, Any],
        choose: Callable[[Sequence[str]], set[str]],
        needed: str | None,
        twice: bool,
        asynchronous: bool,
    ) -> None:
        """Writes the ledger on every rank, then the checkpoint that covers it, beside the loop or at once.

        Rank 0 writes it; each other rank its shards for it, if the state has any.
        """
        world = self._world
        owner = Owner(name, world.rank, world.world_size)
        reports = self._next_reports() if world.world_size > 1 and holds_shards(state) else None
        retry = min(self._config.checkpoint.retry, world.timeout / 2)  # the other ranks wait so long
        retried(self._ledger.sync, retry, "the ledger", self._beat)
        if self._config.debug.ledger:
            self._world.barrier("ledger")

        def prepare(buffer: StateBuffer | None) -> Callable[[Beat], None]:
            self._trackers.sync()
            record = {
                "finished_stages": self.finished,
                "retention": self._retention.note(state["stage"], name, needed),
                "needs": [each for each in (*self.finished.values(), needed) if each not in (None, name)],
            }
            snapshot = take({**state, **self._describe(), **record}, buffer, owner)
            ends = set(self.finished.values())
            staged: list[Staged] = []

            def others() -> list[Staged]:
                if reports is not None and not staged:
                    staged.extend(Staged(**each) for each in reports.collect(self._background.require_here))
                return staged

            def write(beat: Beat) -> None:
                def save() -> None:
                    if self._folder.latest != name:  # else only the last flush of the folder failed
                        self._folder.write(name, snapshot, twice=twice, beat=beat, others=others)

                retried(save, retry, f"the checkpoint {name}", beat)
                beat()
                keep = ends | choose(self._folder.names())
                told(lambda: self._folder.keep_only(keep), self._folder.path)
                self._publish(beat)

            return write

        if world.is_main:
            work: Callable[[StateBuffer | None], Callable[[Beat], None]] | None = prepare
        else:
            work = None if reports is None else partial(self._shards_to, reports, owner, state, twice, retry)
        if asynchronous:
            self._in_flight = name
            if work is not None:
                self._start(partial(work, self._buffer))
            return
        if work is not None and not world.is_main:
            work(None)(self._beat)
        world.on_rank_0(lambda: prepare(None)(self._beat), _what(name), phase="save")

    def _shards_to(
        self, reports: Reports, owner: Owner, state: Any, twice: bool, retry: float, buffer: StateBuffer | None
    ) -> Callable[[Beat], None]:
        """Takes the shards of a rank that is not 0; returns the work that writes them and reports them to rank 0."""
        with reports.telling_errors():
            snapshot = take(state, buffer, owner)

        def write(beat: Beat) -> None:
            def save() -> Staged:
                return self._folder.stage(owner.checkpoint, snapshot, owner.rank, twice=twice, beat=beat)

            with reports.telling_errors():
                what = f"the shards of the checkpoint {owner.checkpoint}"
                reports.tell(asdict(retried(save, retry, what, beat)))

        return write

    def _next_reports(self) -> Reports:
        self._sharded_saves += 1
        return Reports(self._world, f"shards/{self._sharded_saves}")

    def _start(self, prepare: Callable[[], Callable[[Beat], None]]) -> None:
        """Waits for the former save, then copies the state and begins to write it. An error is kept for `settle`."""
        self._background.finish(self._beat)
        if self._background.failed:
            return
        try:
            write = prepare()
        except STOPS:
            raise
        except BaseException as error:  # other people's code is asked for its state
            self._background.fail(error)
        else:
            self._background.start(write)

    def _beat(self) -> None:
        self._world.heartbeat.enter("save")

    def _note_failure(self) -> None:
        self._world.failing = True


def _what(name: str) -> str:
    return f"saving the checkpoint {name}"


def _by_age(stage: str, names: Sequence[str]) -> list[str]:
    """Returns the checkpoints within a stage, after their evaluation, the newest last."""
    moments = [moment for moment in map(Moment.named, names) if moment is not None]
    steps = [each.step for each in moments if each.stage == stage and each.step is not None and not each.open]
    return [str(Moment(stage, step)) for step in sorted(steps)]
