"""Casts the trained float model to bf16 or fp16, and evaluates it on all ranks."""

from __future__ import annotations

from typing import Any

from dist_train.config.stages import HalfConfig
from dist_train.models.half_precision import HalfModel, choose_dtype, require_half
from dist_train.stages.base import Stage
from dist_train.stages.context import Context
from dist_train.training.evaluate import evaluate
from dist_train.trees import map_leaves


class Half(Stage):
    """Casts parameters and inputs; outputs stay float32. The metrics are recorded under the dtype's name."""

    settings: HalfConfig

    def run(self, context: Context) -> dict[str, Any]:
        world = context.world
        # Nodes may differ, so rank 0's device decides for all ranks.
        dtype, why = world.on_rank_0(lambda: choose_dtype(self.settings.dtype, world.device), "choosing a dtype")
        context.progress.say(f"{self.name}: {dtype}, {why}")
        model = HalfModel(context.model, dtype)
        require_half(model, map_leaves(lambda leaf: leaf.to(world.device), context.data.example(2)))
        evaluation = evaluate(model, context.data.evaluation_batches(), context.task, world)
        context.results["models"][dtype] = dict(evaluation.metrics)
        context.keep_details(dtype, evaluation)
        return {"dtype": dtype}

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        return
