"""Quantization-aware training: runs the training loop on the model with fake quantization."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from dist_train.config.advice import clipping_undone
from dist_train.config.stages import QATConfig
from dist_train.console.progress import COUNTS
from dist_train.programs.program import open_program
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from dist_train.stages.base import Stage
from dist_train.stages.context import Context
from dist_train.stages.gradient_gate import gate_gradients
from dist_train.stages.int8_evaluation import convert_on_rank_0, evaluate_int8
from dist_train.stages.prepare_gate import gate_prepare
from dist_train.stages.ptq import calibrate, lost_points
from dist_train.stages.train import StageLearner, ema_sample, run_loop
from dist_train.training.evaluate import Evaluation
from dist_train.training.hooks import FreezeSchedule, Hook
from dist_train.training.parts import float_names, resolve_parts
from dist_train.training.recalibration import estimate_moments, estimate_ranges
from dist_train.training.reduction import StepReduction
from dist_train.training.selection import INT8


class QAT(Stage):
    """Fine-tunes with fake quantization; learns ranges and BatchNorm statistics from the data of all ranks.

    If ptq's loss of accuracy is within `qat.budget`, it trains nothing and hands on ptq's state.
    """

    settings: QATConfig

    def run(self, context: Context) -> dict[str, Any]:
        if self._is_left_out(context):
            assert context.quantized is not None
            return {"quantized": context.quantized}
        for problem in clipping_undone(context.config):
            context.progress.warn(str(problem))
        prepared = context.prepared()
        learner = QuantizedLearner(context, self.name, self.settings, prepared)
        if context.quantized is None:
            gate_prepare(context, prepared)
            gate_gradients(context, prepared)
            if context.resume is None:
                calibrate(context, prepared, context.config.ptq)
        if self.settings.dropout:
            prepared.keep_dropout()
        state = run_loop(context, self.name, self.settings, learner)
        figures = {name: value for name, value in state.metrics.items() if not name.startswith(INT8)}
        context.results["models"]["fake_quant"] = figures
        context.keep_details("fake_quant", learner.evaluation_of(state))
        return {"quantized": context.after_training(state.chosen).state_dict()}

    def _is_left_out(self, context: Context) -> bool:
        """Tells whether ptq is within the budget; prints and records it. Equal on all ranks, because metrics are."""
        if self.settings.budget is None:
            return False
        models, task = context.results["models"], context.task
        if "fp32" not in models:  # this run did not train the float model, so its metrics are not known yet
            evaluation = context.evaluate(context.model)
            models["fp32"] = dict(evaluation.metrics)
            context.keep_details("fp32", evaluation)
        lost = lost_points(context)
        # Comparisons with NaN are false, so a NaN trains.
        within = lost <= self.settings.budget
        left_out = within and not self.settings.always
        context.results["stages"].setdefault(self.name, {}).update(
            {"ptq_lost_points": round(lost, 6), "budget": self.settings.budget, "left_out": left_out}
        )
        if context.resume is None:
            unneeded = "not needed: skipped" if left_out else "not needed, but qat.always is set"
            verdict = unneeded if within else "needed"
            bound = "within" if within else "beyond"
            context.progress.say(
                f"{self.name}: ptq loses {lost:.2f} points of {task.headline}, {bound} the budget of "
                f"{self.settings.budget:g}: qat is {verdict}"
            )
        return left_out

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        context.set_quantized(product["quantized"])


class QuantizedLearner(StageLearner):
    """Trains the prepared model."""

    def __init__(self, context: Context, stage: str, settings: QATConfig, prepared: PreparedModel) -> None:
        self._ranges = Ranges(prepared, settings.observer)
        reduction = StepReduction(context.world, prepared, self._ranges, settings.averaging)
        parts = resolve_parts(context.config, stage, context.model)
        names = float_names(prepared, context.model) if parts else {}
        super().__init__(prepared, reduction, parts, names, settings.unfreeze_at, parts.recomputed)
        self._context, self._settings, self._prepared = context, settings, prepared

    def hooks(self, total_steps: int) -> Sequence[Hook]:
        return [FreezeSchedule(self._settings, total_steps, self._prepared, self._ranges, self.reduction)]

    def measure(self, model: nn.Module) -> Evaluation:
        evaluation = self._context.evaluate_prepared(model)
        if not (self._settings.select_by or "").startswith(INT8):
            return evaluation
        assert isinstance(model, PreparedModel)
        program, _ = convert_on_rank_0(self._context, model, lambda converted: None)
        int8 = evaluate_int8(self._context, open_program(program)).metrics
        named = {f"{INT8}{name}": value for name, value in int8.items() if name not in COUNTS}
        return dataclasses.replace(evaluation, metrics={**evaluation.metrics, **named})

    def recalibrate(self, averaged: nn.Module) -> None:
        """Re-estimates only the statistics that are not frozen; the averaged steps used frozen ones as constants."""
        assert isinstance(averaged, PreparedModel)
        context, batches = self._context, ema_sample(self._context, self._settings)
        with context.strategy.unsharded(averaged):
            if not self._prepared.batch_norm_frozen:
                estimate_moments(averaged, batches, context.world, context.strategy.autocast)
            if not self._ranges.frozen:
                estimate_ranges(averaged, batches, context.world, context.strategy.autocast)
