"""What the stages of a run share."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from dist_train.checkpoint import CheckpointFolder
from dist_train.config import Config
from dist_train.data.arrays import ImageArrays, Splits
from dist_train.data.augment import Augmentation
from dist_train.data.loader import EstimationLoader, EvaluationLoader, Source, TrainLoader
from dist_train.data.mix import Mix, NoMix
from dist_train.data.permutation import derive_key
from dist_train.data.sampler import ElasticDistributedSampler
from dist_train.deployment import describe_data
from dist_train.errors import DataError, GateError
from dist_train.evaluate import Evaluation, evaluate
from dist_train.ledger import Ledger, NoLedger
from dist_train.program import Program
from dist_train.progress import Progress
from dist_train.quantization.backend import QuantizationBackend, as_configuration, build_backend
from dist_train.quantization.prepared import PreparedModel
from dist_train.retention import Retention
from dist_train.run_dir import RunDir, replace_json
from dist_train.same_model import PREPARED, SameModel
from dist_train.strategies.base import Strategy
from dist_train.tasks import Task
from dist_train.trackers.base import Trackers
from dist_train.world import World


@dataclass
class Context:
    """What the stages of a run share.

    Attributes:
        model: the float model, on the device.
        quantized: state of the prepared model after ptq or qat; None before.
        half: dtype of the half model, bf16 or fp16; None before half.
        program: the converted int8 program; None before convert.
        ranges_sha256: digest of the ranges that it was converted with.
        probe: on rank 0, `inputs` and the converted model's `outputs`, as it computed them in memory.
        results: what results.json holds.
        finished: stage -> name of the checkpoint at its end.
        resume: the loop's state where this stage was interrupted, else None.
        threads: CPU threads of this rank.
    """

    config: Config
    world: World
    run_dir: RunDir
    folder: CheckpointFolder
    splits: Splits
    task: Task
    strategy: Strategy
    trackers: Trackers
    ledger: Ledger | NoLedger
    progress: Progress
    model: nn.Module
    threads: int
    results: dict[str, Any]
    finished: dict[str, str] = field(default_factory=dict)
    resume: dict[str, Any] | None = None
    quantized: dict[str, Any] | None = None
    half: str | None = None
    program: Program | None = None
    ranges_sha256: str = ""
    probe: dict[str, torch.Tensor] = field(default_factory=dict)
    same_model: SameModel = field(default_factory=SameModel)
    _prepared: PreparedModel | None = None
    retention: Retention = field(init=False)
    _kept_source: Source | None = None

    def __post_init__(self) -> None:
        self.retention = Retention(self.config.checkpoint.keep)

    @cached_property
    def _described(self) -> dict[str, Any]:
        """So that the models can be rebuilt without the data."""
        return describe_data(self.splits)

    def example(self, rows: int) -> torch.Tensor:
        """A synthetic batch of zeros, float32 [rows, C, H, W], on the CPU."""
        return torch.zeros(rows, *self.splits.input_shape)

    @property
    def backend(self) -> QuantizationBackend:
        return build_backend(self.config.qat)

    def prepared(self) -> PreparedModel:
        """The float model with fake quantization, in the state that `quantized` gives; made once."""
        if self._prepared is None:
            example = self.example(2).to(self.world.device)
            if self.config.model.channels_last:
                example = example.contiguous(memory_format=torch.channels_last)
            with as_configuration():
                self._prepared = self.backend.prepare(self.model, example, self.config.qat.rules)
            self.same_model.require(PREPARED, self._prepared, example)
            if self.quantized is not None:
                self._prepared.load_state_dict(self.quantized)
        return self._prepared

    def require_same_data(self, recorded: str) -> None:
        """Refuses to resume on other data: samples would be lost and repeated.

        Raises:
            DataError: the dataset's content (for a map-style dataset its length) is not what it was.
        """
        if recorded != self.splits.fingerprint:
            raise DataError(
                f"the dataset {self.config.data.name} is not what it was when this run began",
                "give back the same data, or start anew with another --run.dir",
            )

    def require_same_weights(self, recorded: dict[str, Any]) -> None:
        """Refuses to resume from other trained weights than those that `recorded`, the results of an earlier attempt, names.

        Where they were not read again, because checkpoints hold the model, there is nothing to compare.

        Raises:
            DataError: their content is not what it was.
        """
        before, now = (results.get("initial_weights") for results in (recorded, self.results))
        if now is not None and before is not None and before["sha256"] != now["sha256"]:
            raise DataError(
                f"{now['source']} is not what it was when this run began",
                "give back the same weights, or start anew with another --run.dir",
            )

    def float_copy(self) -> nn.Module:
        """A copy of the float model on the CPU, in eval mode."""
        return copy.deepcopy(self.model).cpu().eval()

    def set_quantized(self, state: dict[str, Any]) -> None:
        """Makes `state` that of the prepared model."""
        self.quantized = state
        if self._prepared is not None:
            self._prepared.load_state_dict(state)

    def source(self, split: ImageArrays | Dataset[Any], seed: int) -> Source:
        """Rows of a split; its worker processes, where it has any, live as long as it does."""
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
        )

    @property
    def _evaluation_source(self) -> Source:
        if self._kept_source is None:
            self._kept_source = self.source(self.splits.eval, self.config.run.seed)
        return self._kept_source

    @property
    def train_samples(self) -> int:
        """Samples to train on; of an iterable dataset those that an epoch takes."""
        if self.splits.steps_per_epoch is not None:
            return self.splits.steps_per_epoch * self.config.data.global_batch_size
        return len(cast(Sized, self.splits.train))

    @property
    def workers(self) -> int:
        """Worker processes of this rank."""
        asked = self.config.data.workers
        return self.world.share_of_cores() if asked == "auto" else asked

    def train_loader(self, stage: str) -> TrainLoader:
        """This rank's share of each global batch; order and augmentation are functions of (seed, stage, epoch, sample id)."""
        data, seed = self.config.data, derive_key("stage", self.config.run.seed, stage)
        # Micro-batches that ranks synchronise in are as many on each; others are cut as each rank's own share asks.
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
        """The first rows of the evaluation set, as a model takes them: float32 [rows, C, H, W], on the CPU, contiguous."""
        batches = EvaluationLoader(self._evaluation_source, rows, 1, 0, rows)
        return next(iter(batches)).inputs.cpu().contiguous()

    def evaluation_batches(self) -> EvaluationLoader:
        """This rank's part of the evaluation set."""
        size = self.config.data.eval_batch_size
        limit = 2 * size * self.world.world_size if self.config.debug.fast_dev_run else None
        return EvaluationLoader(self._evaluation_source, size, self.world.world_size, self.world.rank, limit)

    def evaluation_sample(self, samples: int | None) -> EstimationLoader:
        """Rows of the evaluation set, drawn by the seed, all on this rank; None: the whole set."""
        source, size = self._evaluation_source, self.config.data.eval_batch_size
        if self.config.debug.fast_dev_run:
            samples = min(samples or 2 * size, 2 * size)
        return EstimationLoader(source, samples or len(source), size, self.config.run.seed, 1, 0)

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Evaluates a model in the config's precision. Collective."""
        model.eval()
        return evaluate(model, self.evaluation_batches(), self.task, self.world, self.strategy.autocast)

    def evaluate_prepared(self, prepared: nn.Module) -> Evaluation:
        """Like `evaluate`, without letting the evaluation set into the ranges."""
        assert isinstance(prepared, PreparedModel)
        with prepared.observing(False):
            return self.evaluate(prepared)

    def keep_details(self, model: str, evaluation: Evaluation) -> None:
        """Writes what the final evaluation of `model` showed besides its scalars, for reports. Collective."""
        assert evaluation.details is not None
        found = evaluation.details.gather(self.world, self.splits.mean, self.splits.std)
        if self.world.is_main:
            path = self.run_dir.details(model)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_json(path, {"model": model, "classes": list(self.splits.classes or ()), **found})

    def gate(
        self,
        name: str,
        value: float,
        bound: float,
        passed: bool,
        hint: str,
        detail: str = "",
        runtime: str = "",
        samples: int = 0,
    ) -> None:
        """Records a measured fidelity; rank 0 writes results.json before a failure ends the run.

        detail: what a failure says besides the figures, on rank 0. runtime: where it was measured, if not in process.
        samples: on how many, where that is not the whole evaluation set.

        Raises:
            GateError: on every rank, where it did not pass.
        """
        # JSON has no NaN: a value that is not finite is recorded as null, and never passes.
        passed = passed and math.isfinite(value)
        gate = {"value": value if math.isfinite(value) else None, "bound": bound, "passed": passed}
        extra = {"runtime": runtime, "samples": samples}
        self.results["gates"][name] = gate | {key: value for key, value in extra.items() if value}
        self.results.get("gates_skipped", {}).pop(name, None)
        if not passed:
            if self.world.is_main:
                replace_json(self.run_dir.results, self.results)
            place = f" in {runtime}" if runtime else ""
            message = f"the gate `{name}` failed{place}: measured {value:.6g}, bound {bound:g}"
            raise GateError(message + (detail if self.world.is_main else ""), hint)

    def skip_gate(self, name: str, reason: str) -> None:
        """Records that a gate did not run, and why: in results.json beside `gates`, whose entries were all measured."""
        self.results.setdefault("gates_skipped", {})[name] = reason

    # What follows is the loop's `Checkpoints`.

    def save_step(
        self, stage: str, step: int, state: dict[str, Any], best_first: Sequence[int], needed: int | None
    ) -> None:
        # The state of the same step after its evaluation gets a name of its own, while the one before is in force.
        name = self._step_name(stage, step) + ("-open" if state["epoch_open"] else "")
        best = [self._step_name(stage, each) for each in best_first]
        kept = {name} if needed is None else {name, self._step_name(stage, needed)}

        def choose(names: Sequence[str]) -> set[str]:
            by_age = [each for each in names if re.fullmatch(rf"{re.escape(stage)}-\d+", each)]
            return self.retention.choose(by_age, best, kept)

        self._save(name, {"stage": stage, "finished": False, "payload": state}, choose)

    def load_step(self, stage: str, step: int) -> dict[str, Any]:
        payload: dict[str, Any] = self.folder.load(self._step_name(stage, step))["payload"]
        return payload

    def save_stage(self, stage: str, product: dict[str, Any]) -> None:
        """Saves the end of a stage: what later stages need of it."""
        name = f"{stage}-end"
        self.finished[stage] = name
        self.resume = None
        self._save(name, {"stage": stage, "finished": True, "payload": product}, lambda names: {name})

    @staticmethod
    def _step_name(stage: str, step: int) -> str:
        return f"{stage}-{step:08d}"

    def _save(self, name: str, state: dict[str, Any], choose: Callable[[Sequence[str]], set[str]]) -> None:
        """The ledger first on every rank, then the checkpoint that covers it; rank 0 writes while the others wait on the store."""
        self.ledger.sync()
        if self.config.debug.ledger:
            self.world.barrier("ledger")

        def write() -> None:
            self.trackers.sync()
            record = {
                "data": self.splits.fingerprint,
                "described": self._described,
                "same_model": self.same_model.state_dict(),
                "results": self.results,
                "finished_stages": self.finished,
                "retention": self.retention.note(state["stage"], name),
            }
            self.folder.save(name, {**state, **record})
            self.folder.keep_only({*choose(self.folder.names()), *self.finished.values()})

        self.world.on_rank_0(write, f"saving the checkpoint {name}", phase="save")
