"""Loads a run's data: this rank's share of the training and evaluation sets, and samples of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from dist_train.config.tree import Config
from dist_train.data.arrays import ImageArrays
from dist_train.data.augment.mix import Mix, NoMix
from dist_train.data.augment.steps import Augmentation
from dist_train.data.content import Content
from dist_train.data.items import rows_in
from dist_train.data.loader import EstimationLoader, EvaluationLoader, Source, TrainLoader
from dist_train.data.packs.index import packed_as
from dist_train.data.row_weights import weights_digest
from dist_train.data.sampler import ElasticDistributedSampler, seed_of_stage
from dist_train.data.splits import Splits, describe_data
from dist_train.data.stack import CheckTargets
from dist_train.distributed.world import World
from dist_train.errors import DataError
from dist_train.trees import Tree, map_leaves


@dataclass(kw_only=True)
class RunData:
    """A run's data, on this rank.

    Attributes:
        check_targets: of the task; checks the targets of every batch that is not of image arrays.
        content: items of each split, as they were read at set-up; the same on all ranks.
        weights: of the training rows, float64, by which they are drawn; None: each is taken once an epoch.
    """

    config: Config
    world: World
    splits: Splits
    check_targets: CheckTargets | None = None
    content: dict[str, Content] = field(default_factory=dict)
    weights: np.ndarray | None = None
    _kept_source: Source | None = field(default=None, init=False)

    @cached_property
    def described(self) -> dict[str, Any]:
        """The data's description for an artifact's manifest; see `describe_data`."""
        return describe_data(self.splits)

    @cached_property
    def weights_sha256(self) -> str:
        """Digest of `weights`; "" for none."""
        return weights_digest(self.weights)

    def example(self, rows: int) -> Tree:
        """Returns the first training rows that can be decoded as the model takes them, on the CPU, contiguous."""
        return self.splits.example(rows)

    def require_same_data(self, recorded: str) -> None:
        """Refuses to resume on other data, as samples would be lost or repeated.

        Raises:
            DataError: the dataset's content (of a map-style dataset, its length) has changed.
        """
        if recorded != self.splits.fingerprint:
            began, now = (packed_as(text) for text in (recorded, self.splits.fingerprint))
            if began != now:
                again = "dist-train pack CONFIG, with the settings of the run, and the same command"
                elsewhere = "--data.cache_dir FOLDER, one without a pack of these images"
                raise DataError(
                    f"this run began with {began} and would go on with {now}, whose crops are others",
                    f"{again if '+pack' in recorded else elsewhere}; or start a new run with another --run.dir",
                )
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
            collate=self.splits.collate_of(split),
            dynamic=self.splits.dynamic,
            example=self.splits.example,  # not of this object, which keeps a source: workers end with it
        )

    @property
    def _evaluation_source(self) -> Source:
        if self._kept_source is None:
            assert self.splits.eval is not None  # open_splits has asked
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
        data, seed = self.config.data, seed_of_stage(self.config.run.seed, stage)
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
            weights=self.weights,
            replacement=data.sampling is None or data.sampling.replacement,
            samples=None if data.sampling is None else data.sampling.samples,
        )
        mix = Mix(data.mix, seed) if stage == "train" and (data.mix.mixup or data.mix.cutmix) else NoMix()
        own = None if joint else data.micro_batch_size
        # In shards, too, ranks communicate in each micro-batch.
        alike = self.config.strategy == "fsdp"
        return TrainLoader(self.source(self.splits.train, seed), sampler, own, mix, alike)

    def probe_inputs(self, rows: int = 16) -> Tree:
        """Returns the first rows of the evaluation set as the model takes them, on the CPU, contiguous."""
        batches = EvaluationLoader(self._evaluation_source, rows, 1, 0, rows)
        return map_leaves(lambda leaf: leaf.cpu().contiguous(), next(iter(batches)).inputs)

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
