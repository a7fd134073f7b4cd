"""Writes for `tensorboard --logdir RUN_DIR/logs/tensorboard`, where each stage is a run with its own steps."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from dist_train.run_dir.paths import RunDir
from dist_train.trackers.base import Tracker


class TensorBoard(Tracker):
    def __init__(self, run_dir: RunDir, run_name: str, attempt: int) -> None:
        super().__init__(run_dir, run_name, attempt)
        self._writers: dict[str, SummaryWriter] = {}

    def log(self, stage: str, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        if stage not in self._writers:
            # This attempt repeats the steps from here on, so TensorBoard drops an earlier attempt's values.
            self._writers[stage] = SummaryWriter(
                str(self.run_dir.tensorboard / stage), purge_step=step if self.attempt else None
            )
        for name, value in scalars.items():
            self._writers[stage].add_scalar(name, value, step)

    def sync(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
