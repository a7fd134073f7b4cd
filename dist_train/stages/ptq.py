"""Post-training quantization: the ranges of the activations, from all ranks' data, without training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.config.stages import PTQConfig
from dist_train.data.arrays import Batch
from dist_train.distributed.world import World
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.range_search import Histograms, least_error_ranges, percentile_ranges
from dist_train.quantization.ranges import Ranges
from dist_train.stages.base import Stage
from dist_train.stages.context import Context
from dist_train.stages.prepare_gate import gate_prepare
from dist_train.training.recalibration import estimate_moments

# Rows of a calibration batch at any world size: ranks take turns with whole batches, so 512 samples serve 16 ranks.
_CALIBRATION_ROWS = 32
_LITTLE = 0.1  # points of the task's metric: the bar that qat itself is measured by


class PTQ(Stage):
    """Initialises ranges and measures the model quantized without training."""

    settings: PTQConfig

    def run(self, context: Context) -> dict[str, Any]:
        prepared = context.prepared()
        gate_prepare(context, prepared)
        calibrate(context, prepared, self.settings)
        evaluation = context.evaluate_prepared(prepared)
        context.results["models"]["ptq"] = evaluation.metrics
        context.keep_details("ptq", evaluation)
        self._say_loss(context)
        return {"quantized": prepared.state_dict()}

    def _say_loss(self, context: Context) -> None:
        """Says how much ptq lost, where the run knows FP32's figure; with a budget, qat says it."""
        config = context.config
        if "fp32" not in context.results["models"] or ("qat" in config.stages and config.qat.budget is not None):
            return
        lost = lost_points(context)
        verb = "loses" if lost >= 0 else "gains"
        line = f"{self.name}: {verb} {abs(lost):.2f} points of {context.task.headline} against fp32"
        if "qat" in config.stages and lost <= _LITTLE:
            line += f"; where that will do, --qat.budget {_LITTLE:g} leaves qat out"
        context.progress.say(line)

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        context.set_quantized(product["quantized"])


def lost_points(context: Context) -> float:
    """Returns how many points (0.01) of the task's metric ptq lost against FP32, below 0 where it gained."""
    models, task = context.results["models"], context.task
    sign = 1 if task.headline in task.lower_is_better else -1
    lost: float = 100 * sign * (models["ptq"][task.headline] - models["fp32"][task.headline])
    return round(lost, 9) + 0.0  # no -0


def calibrate(context: Context, prepared: PreparedModel, settings: PTQConfig) -> None:
    """Sets every range from `samples` training samples of all ranks. Collective.

    The seed draws the samples, as the first ones of a sorted dataset are of one class. Of a stream they are the first ones.
    """
    rows = min(_CALIBRATION_ROWS, context.config.data.eval_batch_size)
    batches = context.data.training_sample(settings.samples, rows)
    if _knows_no_data(context.model):
        context.progress.say(
            "batch norm has no statistics yet: they are estimated first, from the samples of the ranges"
        )
        prepared.fake_quantize(False)
        estimate_moments(prepared, batches, context.world)
    initialise_ranges(prepared, batches, context.world, settings)


def _knows_no_data(model: nn.Module) -> bool:
    """Tells whether all batch norms have their initial statistics, as in a model whose training begins with qat.

    With these a deep network's activations fade or grow from layer to layer, so ranges in evaluation mode say nothing of
    those in training. EfficientNet-B0's end at 1e-13, which would clip every activation and gradient.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_var is not None]
    pairs = [(norm.get_buffer("running_mean"), norm.get_buffer("running_var")) for norm in norms]
    return bool(pairs) and all(bool((mean == 0).all()) and bool((variance == 1).all()) for mean, variance in pairs)


@torch.no_grad()
def initialise_ranges(prepared: PreparedModel, batches: Iterable[Batch], world: World, settings: PTQConfig) -> None:
    """Sets every range from all ranks' batches, in eval mode. Collective: one MAX, and one SUM where it clips.

    The extremes or counts of all samples decide, so the result does not depend on the number of ranks.

    Args:
        batches: of this rank; read once, or twice where `settings.ranges` clips.

    Raises:
        QuantizationError: an activation is not finite, or was never reached.
    """
    ranges = Ranges(prepared)
    prepared.eval()
    prepared.observe(True)
    prepared.fake_quantize(False)
    ranges.drop()
    world.heartbeat.begin("evaluate")
    for batch in batches:
        world.heartbeat.enter("evaluate")
        prepared(batch.inputs)
    ranges.update(world.all_reduce(ranges.observed(), "max"), averaging=1.0)
    ranges.require_known()
    if settings.ranges != "min_max":
        prepared.observe(False)
        histograms = Histograms(ranges)
        with histograms.counting():
            for batch in batches:
                world.heartbeat.enter("evaluate")
                prepared(batch.inputs)
        world.all_reduce(histograms.counts, "sum")
        if settings.ranges == "percentile":
            ranges.assign(*percentile_ranges(histograms, settings.percentile))
        else:
            ranges.assign(*least_error_ranges(histograms, ranges))
        prepared.observe(True)
    prepared.fake_quantize(True)
