"""Loads a run's data: this rank's share of the training and evaluation sets, and samples of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from dist_train.config.tree import Config
from dist_train.data.arrays import ImageArrays
from dist_train.data.augment.mix import Mix, NoMix
from dist_train.data.augment.steps import Augmentation
from dist_train.data.items import rows_in
from dist_train.data.loader import EstimationLoader, EvaluationLoader, Source, TrainLoader
from dist_train.data.permutation import derive_key
from dist_train.data.sampler import ElasticDistributedSampler
from dist_train.data.splits import Splits, describe_data
from dist_train.data.stack import CheckTargets
from dist_train.distributed.world import World
from dist_train.errors import DataError


@dataclass(kw_only=True)
class RunData:
    """A run's data, on this rank.

    Attributes:
        check_targets: of the task; checks the targets of every batch that is not of image arrays.
    """

    config: Config
    world: World
    splits: Splits
    check_targets: CheckTargets | None = None
    _kept_source: Source | None = field(default=None, init=False)

    @cached_property
    def described(self) -> dict[str, Any]:
        """The data's description for an artifact's manifest; see `describe_data`."""
        return describe_data(self.splits)

    def example(self, rows: int) -> torch.Tensor:
        """Returns a synthetic batch of zeros, float32 [rows, C, H, W], on the CPU."""
        return torch.zeros(rows, *self.splits.input_shape)

    def require_same_data(self, recorded: str) -> None:
        """Refuses to resume on other data, as samples would be lost or repeated.

        Raises:
            DataError: the dataset's content (of a map-style dataset, its length) has changed.
        """
        if recorded != self.splits.fingerprint:
            raise DataError(
                f"the dataset {self.config.data.name} has changed since this run began",
                "restore the same data, or start a new run with another --run.dir",
            )

    def source(self, split: ImageArrays | Dataset[Any], seed: int) -> Source:
        """Returns the rows of a split. Its worker processes, if any, live as long as the returned source."""
        data = self.config.data
        augment = data.augment[getattr(split, "own_steps", 0) :]
        return Source(
            split,
            Augmentation(augment, seed=seed, mean=self.splits.mean, std=self.splits.std),
            self.world.device,
            self.config.model.channels_last,
            self.workers,
            seed,
            skip_corrupt=data.on_corrupt == "skip",
            size=self.train_samples if isinstance(split, IterableDataset) else None,
            check_targets=self.check_targets,
        )

    @property
    def _evaluation_source(self) -> Source:
        if self._kept_source is None:
            self._kept_source = self.source(self.splits.eval, self.config.run.seed)
        return self._kept_source

    @property
    def train_samples(self) -> int:
        """Number of training samples; of an iterable dataset, the number per epoch."""
        if self.splits.steps_per_epoch is not None:
            return self.splits.steps_per_epoch * self.config.data.global_batch_size
        return rows_in(self.splits.train)

    @property
    def workers(self) -> int:
        """Number of data workers of this rank."""
        asked = self.config.data.workers
        return self.world.share_of_cores() if asked == "auto" else asked

    def train_loader(self, stage: str) -> TrainLoader:
        """Returns this rank's share of each global batch.

        Order and augmentation are functions of (seed, stage, epoch, sample id).
        """
        data, seed = self.config.data, derive_key("stage", self.config.run.seed, stage)
        # With sync_batchnorm ranks communicate in each micro-batch, so the sampler cuts equally many for each rank.
        # Otherwise each rank cuts its share by itself.
        joint = stage == "train" and self.config.sync_batchnorm
        sampler = ElasticDistributedSampler(
            range(self.train_samples),
            self.world.world_size,
            self.world.rank,
            shuffle=self.splits.steps_per_epoch is None,
            seed=seed,
            drop_last=data.drop_last,
            global_batch_size=data.global_batch_size,
            micro_batch_size=data.micro_batch_size if joint else None,
        )
        mix = Mix(data.mix, seed) if stage == "train" and (data.mix.mixup or data.mix.cutmix) else NoMix()
        own = None if joint else data.micro_batch_size
        return TrainLoader(self.source(self.splits.train, seed), sampler, own, mix)

    def probe_inputs(self, rows: int = 16) -> torch.Tensor:
        """Returns the first rows of the evaluation set as model inputs: float32 [rows, C, H, W], CPU, contiguous."""
        batches = EvaluationLoader(self._evaluation_source, rows, 1, 0, rows)
        return next(iter(batches)).inputs.cpu().contiguous()

    def evaluation_batches(self) -> EvaluationLoader:
        """Returns this rank's part of the evaluation set."""
        size = self.config.data.eval_batch_size
        limit = 2 * size * self.world.world_size if self.config.debug.fast_dev_run else None
        return EvaluationLoader(self._evaluation_source, size, self.world.world_size, self.world.rank, limit)

    def evaluation_sample(self, samples: int | None) -> EstimationLoader:
        """Returns `samples` rows of the evaluation set, drawn by the seed, all on this rank; None: the whole set."""
        source, size = self._evaluation_source, self.config.data.eval_batch_size
        if self.config.debug.fast_dev_run:
            samples = min(samples or 2 * size, 2 * size)
        return EstimationLoader(source, samples or len(source), size, self.config.run.seed, 1, 0)

    def training_sample(self, samples: int, rows: int) -> EstimationLoader:
        """Returns this rank's batches of `rows` rows out of `samples` training samples, drawn by the seed.

        The batches of all ranks together are the same at any world size. Of a stream, the first samples are taken.
        """
        config, world = self.config, self.world
        return EstimationLoader(
            self.source(self.splits.train, config.run.seed),
            2 * config.data.eval_batch_size if config.debug.fast_dev_run else samples,
            rows,
            config.run.seed,
            world.world_size,
            world.rank,
            shuffle=self.splits.steps_per_epoch is None,
        )
