"""Agrees on the weights by which the training rows are drawn, and records what the ledger must show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dist_train.config.data import SamplingConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.part import Part
from dist_train.data.row_weights import row_weights, weights_digest
from dist_train.data.splits import Splits
from dist_train.distributed.world import World
from dist_train.errors import DataError, Problem
from dist_train.run_dir.expectation import Draw, Expectation, record_expectation
from dist_train.stages.context import Context
from dist_train.stages.data import RunData


def agreed_weights(sampling: SamplingConfig | None, splits: Splits, world: World) -> np.ndarray | None:
    """Returns the weights of the training rows, the same on all ranks; None without `data.sampling`. Collective.

    Raises:
        DataError: on every rank, where one of them has none, or others.
    """
    if sampling is None:
        return None
    weights: np.ndarray | None = None
    error: DataError | None = None
    try:
        weights = row_weights(sampling, splits)
    except DataError as found:
        error = found
    answers = world.gather((weights_digest(weights), None if error is None else error.message))
    if error is not None:
        raise error
    failed = next((message for _, message in answers if message is not None), None)
    if failed is not None or len({digest for digest, _ in answers}) > 1:
        raise DataError(
            failed or f"the weights of data.sampling ({sampling.weights}) are not the same on all ranks",
            "give a file that all nodes share, or let the dataset give every rank the same",
        )
    return weights


def idle_weights(sampling: SamplingConfig | None, weights: np.ndarray | None) -> Iterator[Problem]:
    """Warns of a draw without replacement that takes every row it can: weights change the order alone."""
    if sampling is None or weights is None or sampling.replacement:
        return
    drawable = int(np.count_nonzero(weights))
    if sampling.samples is None or sampling.samples == drawable:
        message = (
            f"takes all {drawable:,} rows with a weight above 0 in each epoch, so that the weights only order them"
        )
        hint = f"--data.sampling.samples {max(1, drawable // 2)}, or any fewer than {drawable}; or replacement: true"
        yield Problem("data.sampling.replacement", message, hint=hint)


def require_same_weights(data: RunData, recorded: str) -> None:
    """Refuses to resume with other weights than those that the run began with.

    recorded: their digest in a checkpoint.

    Raises:
        DataError: they have changed.
    """
    if recorded != data.weights_sha256:
        raise DataError(
            "the weights of data.sampling have changed since this run began",
            "restore the same weights, or start a new run with another --run.dir",
        )


def expect(context: Context) -> None:
    """Records which samples an epoch consumes, for the ledger's check. Rank 0 only."""
    config, data = context.config, context.data
    settings, train = config.data, data.splits.train
    batch = settings.global_batch_size
    loader = data.train_loader("train")
    steps = min(loader.steps_per_epoch, 2) if config.debug.fast_dev_run else loader.steps_per_epoch
    per_epoch = min(loader.samples_per_epoch, steps * batch)
    ids: np.ndarray | None = train.rows if isinstance(train, Part) else None
    if isinstance(train, ImageArrays):
        ids = train.ids.numpy()
    if ids is not None and np.array_equal(ids, np.arange(len(ids))):
        ids = None
    draw = None
    if settings.sampling is not None:
        assert data.weights is not None
        draw = Draw(
            weights=data.weights,
            seed=config.run.seed,
            replacement=settings.sampling.replacement,
            samples=settings.sampling.samples,
            global_batch_size=batch,
            drop_last=settings.drop_last,
            steps_per_epoch=steps,
        )
    first: dict[str, Any] = {
        stage: {"step": done["began_at_step"], "consumed": done["began_at_step"] % steps * batch}
        for stage, done in context.results["stages"].items()
        if "began_at_step" in done
    }
    record_expectation(context.run_dir, data.train_samples, per_epoch, Expectation(ids, draw, first))
