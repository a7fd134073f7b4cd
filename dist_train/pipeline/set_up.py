"""Opens a session: configures torch, resolves strategy and precision, and builds the parts that stages share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import IterableDataset

from dist_train import registry
from dist_train.artifact.deployable import simulation
from dist_train.cluster.instructions import WITHOUT_VNNI, sums_overflow
from dist_train.config.advice import little_shared_memory, too_many_workers
from dist_train.config.checks.accelerate_fsdp import as_launched
from dist_train.config.checks.strategy import Precision
from dist_train.config.tree import Config
from dist_train.console.progress import Progress
from dist_train.data import shared_memory
from dist_train.data.arrays import ImageArrays
from dist_train.data.datasets.args import cache_folder
from dist_train.data.division import divided
from dist_train.data.first_items import first_batch
from dist_train.data.items import rows_in
from dist_train.data.loader import seed_everything
from dist_train.data.open_splits import open_splits
from dist_train.data.permutation import derive_key
from dist_train.data.splits import Splits
from dist_train.data.stream import PROMISE
from dist_train.distributed.world import World, resolve_threads
from dist_train.errors import ArtifactError, ConfigError, DataError, Problem
from dist_train.models.build import build_model, initial_weights
from dist_train.models.fingerprint import FLOAT, SameModel
from dist_train.models.layout import own_memory, require_one_layout
from dist_train.models.weights import digest, load_weights, require_dense
from dist_train.pipeline.arguments import check_metrics, holds_its_weights
from dist_train.pipeline.auto import Choices, choose, look
from dist_train.pipeline.check_fit import check_fit
from dist_train.pipeline.class_weights import learn_classes
from dist_train.pipeline.memory import little_memory
from dist_train.pipeline.packing import pack_on_nodes, settle_pack
from dist_train.pipeline.same_data import require_same_on_all_ranks
from dist_train.pipeline.sampling import agreed_weights, idle_weights
from dist_train.programs.operators import trust_operators
from dist_train.quantization.backend import as_configuration, build_backend
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.ledger import Ledger, NoLedger
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.replica_ledger import ReplicaLedger
from dist_train.stages.context import Context
from dist_train.stages.data import RunData
from dist_train.strategies.base import Strategy
from dist_train.tasks import Task
from dist_train.trackers.base import Trackers
from dist_train.training.parts import check_parts
from dist_train.trees import leaves, map_leaves


@dataclass(frozen=True)
class Session:
    """The ranks, configured for a run.

    Attributes:
        threads: CPU threads of this rank.
        choices: the resolved values of `auto`.
        packs: True where images are packed at set-up, if the config asks for it.
    """

    config: Config
    run_dir: RunDir
    world: World
    threads: int
    choices: Choices
    progress: Progress
    packs: bool = False

    def build(
        self,
        trackers: Trackers | None = None,
        ledger: Ledger | ReplicaLedger | NoLedger | None = None,
        record: dict[str, Any] | None = None,
    ) -> Context:
        """Builds data, model, task and strategy from the config. Collective.

        record: what checkpoints hold of the run's other files.

        Raises:
            DataError: the data or the initial weights cannot be read, or are not the same on all ranks.
            ConfigError: model, data and task do not fit together.
        """
        config, world = self.config, self.world
        if self.packs:
            pack_on_nodes(config.data, world, world.cores, self.progress.say)
        splits = _splits(config, world)
        content = require_same_on_all_ranks(config.data, splits, config.run.seed, world, self.progress.warn)
        if splits.steps_per_epoch is not None:
            if config.debug.ledger:
                raise DataError(
                    "debug.ledger is true, but the training data is a stream, whose items have no ids to record",
                    "--debug.ledger false, or use a map-style dataset",
                )
            self.progress.say(PROMISE)
        if config.data.split is not None:
            trained, evaluated = rows_in(splits.train), rows_in(splits.eval)
            self.progress.say(f"data.split: {trained:,} of {splits.whole:,} rows to train, {evaluated:,} to evaluate")
        weights_of_rows = agreed_weights(config.data.sampling, splits, world)
        model = _model(config, splits, world)
        folder = CheckpointFolder(self.run_dir.checkpoints)
        task: Task = registry.tasks.get(config.task.name)(splits.num_outputs, config.task.args)
        check_metrics(config, task)
        check_fit(config, model, splits, task, world)
        check_parts(config, model)
        learn_classes(task, splits)
        same_model = SameModel()
        example = map_leaves(lambda leaf: leaf.to(world.device), splits.example(2))
        same_model.require(FLOAT, model, example)
        known = holds_its_weights(config, folder)
        weights = None if known else _load_initial_weights(config, model, splits, world, self.progress)
        if config.quantizes:
            # The full check runs once per run. When resuming, the fingerprint tells whether the model is the same.
            with as_configuration():
                backend = build_backend(config.qat, splits.dynamic)
                backend.check(model, config.qat.rules, example if folder.latest is None else None)
            if bits := config.qat.simulated_bits:
                self.progress.say(f"int8: {simulation(bits)}")
        strategy: Strategy = registry.strategies.get(self.choices.strategy)(world, self.choices.precision)
        strategy.reshard_after_forward = config.fsdp.reshard_after_forward
        results = {
            "run": config.run.name,
            "world_size": world.world_size,
            "world_sizes": [],
            "stages": {},
            "models": {},
            "gates": {},
            **({} if weights is None else {"initial_weights": weights}),
        }
        return Context(
            config=config,
            run_dir=self.run_dir,
            world=world,
            threads=self.threads,
            data=RunData(
                config=config,
                world=world,
                splits=splits,
                check_targets=task.check_targets,
                content=content,
                weights=weights_of_rows,
            ),
            task=task,
            strategy=strategy,
            model=model,
            progress=self.progress,
            trackers=trackers or Trackers([]),
            ledger=ledger or NoLedger(),
            results=results,
            same_model=same_model,
            record=record or {},
        )


def open_session(
    config: Config,
    run_dir: RunDir,
    world: World,
    *,
    threads: int | None = None,
    precision: Precision | None = None,
    engine: str | None = None,
    pack: int | str | None = None,
    packs: bool = False,
    show: bool = True,
) -> Session:
    """Configures torch, and resolves strategy, precision, engine and whether images are packed. Collective.

    Args:
        threads: CPU threads per rank recorded at the run's first start; None: from the config.
        precision: precision of the run to resume or evaluate; None for a new run.
        engine: its `qat.engine`, as it was resolved; None for a new run.
        pack: its `data.args.pack`, as it was resolved; None for a new run.
        packs: True where images that are to be packed are packed; False to read the files, where they are not.
        show: True if rank 0 prints progress.

    Raises:
        SetupError: the ranks cannot run this config.
    """
    try:
        trust_operators(config.export.operators)
    except ArtifactError as error:
        raise ConfigError([Problem("export.operators", error.message, hint=error.hint)]) from error
    kept = threads is not None
    threads = threads or resolve_threads(config.run.threads_per_rank, world)
    _configure_torch(config, threads)
    choices = choose(config, look(world, threads, kept), os.environ, precision, engine)
    config = as_launched(config, os.environ)
    config = config.model_copy(update={"qat": config.qat.model_copy(update={"engine": choices.engine})})
    config = config.model_copy(update={"data": settle_pack(config.data, world, pack, packs)})
    progress = Progress(world.is_main and show, config.log.interval)
    return Session(config, run_dir, world, threads, choices, progress, packs)


def _splits(config: Config, world: World) -> Splits:
    make: Callable[[Any], Splits] = registry.datasets.get(config.data.name)

    def parts() -> Splits:
        splits, split = make(config.data), config.data.split
        # What is no Splits is refused by name there.
        return splits if split is None or not isinstance(splits, Splits) else divided(splits, split)

    return open_splits(parts, cache_folder(config.data), world, config.data.name)


def advise(context: Context, warnings: Sequence[Problem]) -> None:
    """Prints the config's warnings, and further warnings that depend on data and ranks, once, on rank 0."""
    world = context.world
    found = list(warnings)
    if not isinstance(context.data.splits.train, ImageArrays):
        cores = len(os.sched_getaffinity(0))
        found += too_many_workers(context.config.data.workers, world.local_world_size, cores)
        found += _shared_memory(context)
    if context.config.sync_batchnorm and not any(isinstance(each, _BatchNorm) for each in context.model.modules()):
        message = f"does nothing: the model {context.config.model.name} has no BatchNorm"
        found.append(Problem("sync_batchnorm", message, hint="--sync_batchnorm false"))
    found += _overflow(context.config)
    found += idle_weights(context.config.data.sampling, context.data.weights)
    found += little_memory(context.config, context.model, world)
    for problem in found:
        context.progress.warn(str(problem))


def _overflow(config: Config) -> Iterator[Problem]:
    """Warns where the runtimes of this machine compute an int8 model otherwise than it was simulated."""
    wide = config.qat.engine not in ("x86", "fbgemm")
    if config.qat.backend == "pt2e" and wide and "convert" in config.stages and sums_overflow():
        hint = "--qat.engine x86 in a new run, where CPUs like this one will run the model"
        yield Problem("qat.engine", WITHOUT_VNNI, hint=hint)


def _shared_memory(context: Context) -> Iterator[Problem]:
    """Warns of data workers whose batches may not fit into this node's shared memory; asks rank 0's dataset."""
    world, split = context.world, context.data.splits.train
    workers = context.data.workers
    if not world.is_main or not workers or isinstance(split, (ImageArrays, IterableDataset)):
        return
    first = first_batch(split, collate=context.data.splits.collate_of(split))
    with suppress(OSError):  # none is there: the workers' error says so
        free = shared_memory.sizes()[1]
        rows = -(-context.config.data.global_batch_size // world.world_size)
        taken = shared_memory.needed(workers, rows * sum(leaf.nbytes for leaf in leaves(first.inputs)) if first else 0)
        ranks = world.local_world_size
        yield from little_shared_memory(workers * ranks, taken * ranks, free)


def _model(config: Config, splits: Splits, world: World) -> nn.Module:
    """Builds the model on the device; its initial weights depend on the seed only."""
    channels = splits.in_channels  # may read a sample and draw random numbers, so it comes before the seed
    seed_everything(derive_key("weights", config.run.seed))
    model = build_model(config.model, splits.num_outputs, channels)
    require_one_layout(model, world)
    own_memory(model)
    model = model.to(world.device)
    return model.to(memory_format=torch.channels_last) if config.model.channels_last else model


def _load_initial_weights(
    config: Config, model: nn.Module, splits: Splits, world: World, progress: Progress
) -> dict[str, str] | None:
    """Loads model.weights or model.init_from; returns source and SHA-256, None for no weights. Collective.

    Raises:
        DataError: the weights cannot be read, do not fit, or differ between nodes.
    """
    found = initial_weights(config.model)
    if found is None:
        return None
    source, read = found
    made: list[Mapping[str, torch.Tensor]] = []
    # One rank per node reads first, so that a download is in the node's cache for the others.
    world.first_on_node(lambda: made.append(read()), f"reading the weights from {source}")
    state = made[0] if made else read()
    require_dense(state, source)
    sha256 = digest(state)
    if len(set(world.gather(sha256))) > 1:
        raise DataError(f"{source} is not the same on all nodes", "give a path on a file system that all nodes share")
    notes = load_weights(model, state, source, splits.num_outputs)
    progress.say(f"model: starts from {source}" + "".join(f"; {note}" for note in notes))
    return {"source": source, "sha256": sha256}


def _configure_torch(config: Config, threads: int) -> None:
    """Sets threads and determinism, lets each rank load whole models, silences warnings without meaning here."""
    torch.set_num_threads(threads)
    # By an FSDP config of accelerate, transformers would leave weights of all ranks but a node's first to accelerate.
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
    # The first two come from the way SequentialLR starts. The third: weights whose strides fit two memory formats.
    for message in (
        ".*lr_scheduler.step.*before.*optimizer.step.*",
        "The epoch parameter in `scheduler.step",
        "Grad strides do not match bucket view strides",
    ):
        warnings.filterwarnings("ignore", message=message)
