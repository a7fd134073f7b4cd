"""Quantization-aware training: the loop again, on the model with fake quantization."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from dist_train.config_fit import QATConfig
from dist_train.evaluate import COUNTS, Evaluation
from dist_train.hooks import FreezeSchedule, Hook
from dist_train.program import open_program
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from dist_train.reduction import StepReduction
from dist_train.selection import INT8
from dist_train.stages.base import Stage
from dist_train.stages.context import Context
from dist_train.stages.int8 import convert_on_rank_0, evaluate_int8
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

        def evaluate_both(model: nn.Module) -> Evaluation:
            return _with_int8(context, model, context.evaluate_prepared(model))

        by_int8 = (self.settings.select_by or "").startswith(INT8)
        evaluate = LastEvaluation(evaluate_both if by_int8 else context.evaluate_prepared)
        state = run_loop(context, self.name, self.settings, prepared, reduction, hooks, evaluate)
        figures = {name: value for name, value in state.metrics.items() if not name.startswith(INT8)}
        context.results["models"]["fake_quant"] = figures
        context.keep_details("fake_quant", evaluate.of(state))
        return {"quantized": state.chosen.state_dict()}

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        context.set_quantized(product["quantized"])


def _with_int8(context: Context, model: nn.Module, evaluation: Evaluation) -> Evaluation:
    """The evaluation of a prepared model, with the metrics of what it is converted to beside its own. Collective."""
    assert isinstance(model, PreparedModel)
    program, _ = convert_on_rank_0(context, model, lambda converted: None)
    int8 = evaluate_int8(context, open_program(program)).metrics
    named = {f"{INT8}{name}": value for name, value in int8.items() if name not in COUNTS}
    return dataclasses.replace(evaluation, metrics={**evaluation.metrics, **named})
