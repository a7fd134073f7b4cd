"""Holds the parts of a run that its stages share."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dist_train.config.tree import Config
from dist_train.console.progress import Progress
from dist_train.distributed.world import World
from dist_train.errors import DataError, QuantizationError
from dist_train.models.batch_norm import hold_batch_norms
from dist_train.models.fingerprint import PREPARED, SameModel
from dist_train.quantization.backend import QuantizationBackend, as_configuration, build_backend
from dist_train.quantization.prepared import PreparedModel
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import replace_json
from dist_train.run_dir.gates import Gates
from dist_train.run_dir.ledger import Ledger, NoLedger
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.replica_ledger import ReplicaLedger
from dist_train.run_dir.retry import told
from dist_train.stages.checkpoints import StageCheckpoints
from dist_train.stages.data import RunData
from dist_train.strategies.base import Strategy
from dist_train.tasks import Task
from dist_train.trackers.base import Trackers
from dist_train.training.evaluate import Evaluation, evaluate
from dist_train.training.same_state import require_same_state
from dist_train.trees import Tree, is_image, map_leaves


@dataclass(kw_only=True)
class Context:
    """The parts of a run that its stages share.

    Attributes:
        model: the float model, on the device; the stage `train` trains it in place.
        threads: CPU threads of this rank.
        results: the content of results.json.
        products: maps each finished stage to its product.
        resume: the loop's state if the current stage was interrupted, else None.
        extension: state of another run's training, with which `train` begins; None: from the beginning.
        quantized: state of the prepared model after ptq or qat; None before.
        record: copy of config.yaml and of the environment, for checkpoints, from which lost files are rebuilt.
    """

    config: Config
    run_dir: RunDir
    world: World
    threads: int
    data: RunData
    task: Task
    strategy: Strategy
    model: nn.Module
    progress: Progress
    trackers: Trackers
    ledger: Ledger | ReplicaLedger | NoLedger
    results: dict[str, Any]
    same_model: SameModel
    products: dict[str, dict[str, Any]] = field(default_factory=dict)
    resume: dict[str, Any] | None = None
    extension: dict[str, Any] | None = None
    quantized: dict[str, Any] | None = None
    record: dict[str, Any] = field(default_factory=dict)
    gates: Gates = field(init=False)
    checkpoints: StageCheckpoints = field(init=False)
    _prepared: PreparedModel | None = None

    def __post_init__(self) -> None:
        self.gates = Gates(self.run_dir, self.results, self.world.is_main)
        folder = CheckpointFolder(self.run_dir.checkpoints)
        self.checkpoints = StageCheckpoints(
            folder, self.config, self.world, self.ledger, self.trackers, self._for_checkpoints, self.strategy.mesh
        )

    def _for_checkpoints(self) -> dict[str, Any]:
        return {
            "data": self.data.splits.fingerprint,
            "content": {name: each.state_dict() for name, each in self.data.content.items()},
            "row_weights": self.data.weights_sha256,
            "described": self.data.described,  # so that the models can be rebuilt without the data
            "same_model": self.same_model.state_dict(),
            "results": self.results,
            "run": self.record,
        }

    @property
    def backend(self) -> QuantizationBackend:
        return build_backend(self.config.qat, self.data.splits.dynamic)

    def example(self) -> Tree:
        """Returns two rows of inputs, as the model takes them in training: on the device, in its memory format."""

        def arranged(leaf: torch.Tensor) -> torch.Tensor:
            leaf = leaf.to(self.world.device)
            last = self.config.model.channels_last and is_image(leaf)
            return leaf.contiguous(memory_format=torch.channels_last) if last else leaf

        return map_leaves(arranged, self.data.example(2))

    def prepared(self) -> PreparedModel:
        """Returns the float model with fake quantization, with the state `quantized`; built on the first call."""
        if self._prepared is None:
            example = self.example()
            with as_configuration():
                self._prepared = self._prepare(example)
            self.same_model.require(PREPARED, self._prepared, example)
            if self.quantized is not None:
                self._prepared.load_state_dict(self.quantized)
        return self._prepared

    def _prepare(self, example: Tree) -> PreparedModel:
        prepared: object = self.backend.prepare(self.model, example, self.config.qat.rules)
        if not isinstance(prepared, PreparedModel):
            raise QuantizationError(
                f"prepare() of the backend {self.config.qat.backend} returned {type(prepared).__name__}",
                "return a dist_train.quantization.prepared.PreparedModel",
            )
        return prepared

    def set_quantized(self, state: dict[str, Any]) -> None:
        """Sets the state of the prepared model."""
        self.quantized = state
        if self._prepared is not None:
            self._prepared.load_state_dict(state)

    def require_same_weights(self, recorded: dict[str, Any]) -> None:
        """Refuses to resume if the initial weights are not the ones recorded in an earlier attempt's results.

        If checkpoints hold the model, the weights are not read again, and nothing is compared.

        Raises:
            DataError: the weights have changed.
        """
        before, now = (results.get("initial_weights") for results in (recorded, self.results))
        if now is not None and before is not None and before["sha256"] != now["sha256"]:
            raise DataError(
                f"{now['source']} has changed since this run began",
                "restore the same weights, or start a new run with another --run.dir",
            )

    def float_copy(self) -> nn.Module:
        """Returns a copy of the float model on the CPU, in eval mode."""
        return copy.deepcopy(self.model).cpu().eval()

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Evaluates a model in the config's precision. Collective.

        Raises:
            SetupError: on every rank, if the model differs between ranks.
        """
        with self.strategy.unsharded(model):  # ranks may have unequal numbers of batches
            require_same_state(self.world, model, "before an evaluation", self.example())
            model.eval()
            return evaluate(model, self.data.evaluation_batches(), self.task, self.world, self.strategy.autocast)

    def evaluate_prepared(self, prepared: nn.Module) -> Evaluation:
        """Evaluates a prepared model without observing, so that ranges stay as they are. Collective."""
        assert isinstance(prepared, PreparedModel)
        with prepared.observing(False):
            return self.evaluate(prepared)

    def after_training(self, chosen: nn.Module) -> nn.Module:
        """Returns the model that a stage's training chose, whole on every rank. Collective.

        Where the training spread the shared model over the ranks, its place is taken by the returned one.
        """
        whole = self.strategy.whole(chosen)
        assert whole is not None
        if whole is not chosen:
            if isinstance(whole, PreparedModel):
                whole.hold_batch_norms(())  # a copy keeps what the stage has frozen
                self._prepared = whole
            else:
                hold_batch_norms(whole, ())
                self.model = whole
        return whole

    def keep_details(self, model: str, evaluation: Evaluation) -> None:
        """Writes the details of the final evaluation of `model`, for reports. Collective."""
        assert evaluation.details is not None
        splits = self.data.splits
        found = evaluation.details.gather(self.world, splits.mean, splits.std)
        if self.world.is_main:
            path = self.run_dir.details(model)
            details = {"model": model, "classes": list(splits.classes or ()), **found}

            def write() -> None:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_json(path, details, compact=True)

            told(write, path)
