"""Quantization-aware training: the loop again, on the model with fake quantization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_train.config_fit import QATConfig
from dist_train.hooks import FreezeSchedule, Hook
from dist_train.quantization.ranges import Ranges
from dist_train.reduction import StepReduction
from dist_train.stages.base import Stage
from dist_train.stages.context import Context
from dist_train.stages.ptq import calibrate, gate_prepare
from dist_train.stages.train import LastEvaluation, run_loop


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

        evaluate = LastEvaluation(context.evaluate_prepared)
        state = run_loop(context, self.name, self.settings, prepared, reduction, hooks, evaluate)
        context.results["models"]["fake_quant"] = dict(state.metrics)
        context.keep_details("fake_quant", evaluate.of(state))
        return {"quantized": state.chosen.state_dict()}

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        context.set_quantized(product["quantized"])
