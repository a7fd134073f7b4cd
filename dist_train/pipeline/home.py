"""Takes a run from the object store where it is at home, and brings it back."""

from __future__ import annotations

import sys
from collections.abc import Callable

from dist_train.config.tree import Config
from dist_train.errors import DistTrainError, StoreError
from dist_train.run_dir.lease import RankProcess
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.store_lease import PATIENCE_SECONDS
from dist_train.run_dir.working_copy import WorkingCopy


class Home:
    """The store of a run whose `run.dir` is an address. Without one, and on other ranks than 0, it does nothing."""

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        self._config, self._run_dir = config, run_dir
        self._copy: WorkingCopy | None = None
        self._brought_back = False

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
            self._copy.publish(beat)

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
        try:
            if not self._brought_back:
                self._copy.finish(min(self._config.checkpoint.retry, self._config.stop.grace / 2))
        except (StoreError, DistTrainError) as error:  # whatever ends the run is the news
            print(f"dist-train: warning: {error}", file=sys.stderr, flush=True)
        finally:
            self._copy.close()
