"""Checks a run's ledger, and makes its draws by weight again to compare the steps with them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from dist_train.data.sampler import ElasticDistributedSampler, seed_of_stage
from dist_train.errors import RunDirError
from dist_train.run_dir.expectation import Draw
from dist_train.run_dir.ledger import BatchOf, LedgerReport, check


def check_ledger(run_dir: Path) -> LedgerReport:
    """Checks that each sample was consumed once an epoch, or each step's samples as they were drawn by weight.

    Raises:
        RunDirError: there is no ledger, or it cannot be read.
    """
    return check(run_dir, _replay)


def _replay(draw: Draw, ids: np.ndarray | None) -> BatchOf:
    @cache
    def sampler(stage: str) -> ElasticDistributedSampler:
        try:
            return ElasticDistributedSampler(
                range(len(draw.weights)),
                1,
                0,
                seed=seed_of_stage(draw.seed, stage),
                drop_last=draw.drop_last,
                global_batch_size=draw.global_batch_size,
                weights=draw.weights,
                replacement=draw.replacement,
                samples=draw.samples,
            )
        except ValueError as error:
            raise RunDirError(f"the ledger's expected.json is damaged: {error}", "restore the file") from error

    def batch(stage: str, step: int) -> Sequence[int]:
        epoch, place = divmod(step, draw.steps_per_epoch)
        drawn = sampler(stage)
        drawn.set_epoch(epoch)
        rows = drawn.global_batch(place)
        found: list[int] = (rows if ids is None else ids[rows]).tolist()
        return found

    return batch
