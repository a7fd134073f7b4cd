"""Quantization-aware training: the loop again, on the model with fake quantization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dist_train.config_fit import QATConfig
from dist_train.hooks import FreezeSchedule, Hook
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from dist_train.reduction import StepReduction
from dist_train.reestimation import estimate_moments, estimate_ranges
from dist_train.stages.base import Stage
from dist_train.stages.context import Context
from dist_train.stages.ptq import calibrate, gate_prepare
from dist_train.stages.train import LastEvaluation, estimation, run_loop


class QAT(Stage):
    """Fine-tunes with quantization in the loop; ranges and BatchNorm statistics are learned from all ranks' data."""

    settings: QATConfig

    def run(self, context: Context) -> dict[str, Any]:
        prepared = context.prepared()
        ranges = Ranges(prepared)
        if context.quantized is None:
            gate_prepare(context, prepared)
            if context.resume is None:
                calibrate(context, prepared, context.config.ptq)
        reduction = StepReduction(context.world, prepared, ranges, self.settings.averaging)

        def hooks(total_steps: int) -> Sequence[Hook]:
            return [FreezeSchedule(self.settings, total_steps, prepared, ranges, reduction)]

        def reestimate(averaged: nn.Module) -> None:
            """Only what is still learned: the steps that were averaged took what is frozen as constants, and so does their average."""
            assert isinstance(averaged, PreparedModel)
            if not prepared.batch_norm_frozen:
                estimate_moments(averaged, *estimation(context, self.settings))
            if not ranges.frozen:
                estimate_ranges(averaged, *estimation(context, self.settings))

        if self.settings.dropout:
            prepared.keep_dropout()
        evaluate = LastEvaluation(context.evaluate_prepared)
        state = run_loop(context, self.name, self.settings, prepared, reduction, hooks, evaluate, reestimate)
        context.results["models"]["fake_quant"] = dict(state.metrics)
        context.keep_details("fake_quant", evaluate.of(state))
        return {"quantized": state.chosen.state_dict()}

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        context.set_quantized(product["quantized"])
