"""What the stages of a run share."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dist_train.console.progress import Progress
from dist_train.data.splits import describe_data
from dist_train.errors import DataError, GateError
from dist_train.models.fingerprint import PREPARED, SameModel
from dist_train.programs.program import Program
from dist_train.quantization.backend import QuantizationBackend, as_configuration, build_backend
from dist_train.quantization.prepared import PreparedModel
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import replace_json
from dist_train.run_dir.ledger import Ledger, NoLedger
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.retention import Retention
from dist_train.stages.data import RunData
from dist_train.strategies.base import Strategy
from dist_train.tasks import Task
from dist_train.trackers.base import Trackers
from dist_train.training.evaluate import Evaluation, evaluate


@dataclass(kw_only=True)
class Context(RunData):
    """What the stages of a run share, besides its data.

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

    run_dir: RunDir
    folder: CheckpointFolder
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

    def __post_init__(self) -> None:
        self.retention = Retention(self.config.checkpoint.keep)

    @cached_property
    def _described(self) -> dict[str, Any]:
        """So that the models can be rebuilt without the data."""
        return describe_data(self.splits)

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
