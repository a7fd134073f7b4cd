"""Takes a run from the object store where it is at home, and brings it back."""

from __future__ import annotations

import sys
from collections.abc import Callable

from dist_train.config.tree import Config
from dist_train.distributed.world import World
from dist_train.errors import DistTrainError
from dist_train.run_dir.lease import RankProcess
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.store_lease import PATIENCE_SECONDS
from dist_train.run_dir.working_copy import WorkingCopy

_MOST = 0.8  # of the time after a stop for what there is; the rest is for giving the store back


class Home:
    """The store of a run whose `run.dir` is an address. Without one, and on other ranks than 0, it does nothing."""

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        self._config, self._run_dir = config, run_dir
        self._copy: WorkingCopy | None = None
        self._brought_back = False
        self._world: World | None = None

    def heed(self, world: World) -> None:
        """Lets a request to stop end what waits for the store, so that the checkpoint of the stop can be written."""
        self._world = world

    def patience(self, timeout: float) -> float:
        """Returns how long the other ranks wait for `take`, in seconds."""
        return timeout + PATIENCE_SECONDS

    def take(self, process: RankProcess) -> None:
        """Makes the run directory what is at the store, and the store this run's. Rank 0 only.

        Raises:
            DistTrainError: as WorkingCopy.
        """
        if self._config.store is not None:
            self._copy = WorkingCopy(self._config.store, self._run_dir.path, process)

    def publish(self, beat: Callable[[], None]) -> None:
        """Brings a checkpoint to the store, with all that tells of the run."""
        if self._copy is not None:
            # The loop, which asks otherwise, may be waiting for this push.
            self._copy.publish(beat, lambda: self._world is not None and self._world.stop_wanted())

    def bring_back(self, beat: Callable[[], None]) -> None:
        """Brings all of a run that is done to the store. `beat` is called while it goes on.

        Raises:
            StoreError: the store does not answer for `checkpoint.retry` seconds.
        """
        if self._copy is not None:
            self._brought_back = True
            self._copy.finish(self._config.checkpoint.retry, beat)
            print(f"{'at the store':12s} {self._config.store}", flush=True)

    def leave(self) -> None:
        """Gives the store back. Of a run that ends otherwise it brings what there is, within half of `stop.grace`."""
        if self._copy is None:
            return
        half = self._config.stop.grace / 2
        try:
            if not self._brought_back:
                if self._stopping():
                    self._copy.must_end(_MOST * half)
                self._copy.finish(min(self._config.checkpoint.retry, _MOST * half))
        except DistTrainError as error:  # whatever ends the run is the news
            print(f"dist-train: warning: {error}", file=sys.stderr, flush=True)
        finally:
            if self._stopping():
                self._copy.must_end((1 - _MOST) * half)
            self._copy.close()

    def _stopping(self) -> bool:
        return self._world is not None and self._world.stop.requested
