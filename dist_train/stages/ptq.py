"""Post-training quantization: estimates activation ranges from all ranks' data, without training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train import trees
from dist_train.config.stages import PTQConfig
from dist_train.data.arrays import Batch
from dist_train.distributed.world import World
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.range_search import Histograms, least_error_ranges, percentile_ranges
from dist_train.quantization.ranges import Ranges
from dist_train.stages.base import Stage
from dist_train.stages.context import Context
from dist_train.stages.gradient_gate import gate_gradients
from dist_train.stages.prepare_gate import gate_prepare
from dist_train.training.recalibration import estimate_moments

# Rows of a calibration batch at any world size. Ranks take turns with whole batches: 512 samples suffice for 16 ranks.
_CALIBRATION_ROWS = 32
_LITTLE = 0.1  # points of the task's metric; below this loss, the run suggests to leave qat out


class PTQ(Stage):
    """Initialises the ranges and evaluates the fake-quantized model, without training."""

    settings: PTQConfig

    def run(self, context: Context) -> dict[str, Any]:
        prepared = context.prepared()
        gate_prepare(context, prepared)
        gate_gradients(context, prepared)
        calibrate(context, prepared, self.settings)
        evaluation = context.evaluate_prepared(prepared)
        context.results["models"]["ptq"] = evaluation.metrics
        context.keep_details("ptq", evaluation)
        self._say_loss(context)
        return {"quantized": prepared.state_dict()}

    def _say_loss(self, context: Context) -> None:
        """Prints ptq's loss against FP32, if FP32 was evaluated. With `qat.budget`, the stage qat prints it instead."""
        config = context.config
        if "fp32" not in context.results["models"] or ("qat" in config.stages and config.qat.budget is not None):
            return
        lost = lost_points(context)
        verb = "loses" if lost >= 0 else "gains"
        line = f"{self.name}: {verb} {abs(lost):.2f} points of {context.task.headline} against fp32"
        if "qat" in config.stages and lost <= _LITTLE:
            line += f"; {'if that is acceptable, ' if lost > 0 else ''}--qat.budget {_LITTLE:g} skips qat"
        context.progress.say(line)

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        context.set_quantized(product["quantized"])


def lost_points(context: Context) -> float:
    """Returns how many points (0.01) of the task's metric ptq lost against FP32; negative if it gained."""
    models, task = context.results["models"], context.task
    sign = 1 if task.headline in task.lower_is_better else -1
    lost: float = 100 * sign * (models["ptq"][task.headline] - models["fp32"][task.headline])
    return round(lost, 9) + 0.0  # no -0


def calibrate(context: Context, prepared: PreparedModel, settings: PTQConfig) -> None:
    """Sets every range from `settings.samples` training samples over all ranks. Collective.

    The seed draws the samples, because the first samples of a sorted dataset are of one class. Of a stream, the first
    samples are used.
    """
    rows = min(_CALIBRATION_ROWS, context.config.data.eval_batch_size)
    batches = context.data.training_sample(settings.samples, rows)
    if _has_initial_statistics(context.model):
        context.progress.say(
            "the batch norms have no statistics yet: they are estimated first, from the calibration samples"
        )
        prepared.fake_quantize(False)
        estimate_moments(prepared, batches, context.world)
    initialise_ranges(prepared, batches, context.world, settings)


def _has_initial_statistics(model: nn.Module) -> bool:
    """Tells whether all batch norms still have their initial statistics, as when training begins with qat.

    In eval mode, activations of a deep network then shrink or grow from layer to layer. Ranges estimated in eval mode
    would not fit training: EfficientNet-B0's last ranges are 1e-13, which would clip every activation and gradient.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_var is not None]
    pairs = [(norm.get_buffer("running_mean"), norm.get_buffer("running_var")) for norm in norms]
    return bool(pairs) and all(bool((mean == 0).all()) and bool((variance == 1).all()) for mean, variance in pairs)


@torch.no_grad()
def initialise_ranges(prepared: PreparedModel, batches: Iterable[Batch], world: World, settings: PTQConfig) -> None:
    """Sets every range from the batches of all ranks, in eval mode. Collective: a MAX, and a SUM if they are clipped.

    The result depends on the extremes or counts over all samples, not on the number of ranks.

    Args:
        batches: this rank's batches; read once, or twice if `settings.ranges` is not min_max.

    Raises:
        QuantizationError: an activation is not finite, or an observer saw no data.
    """
    ranges = Ranges(prepared)
    prepared.eval()
    prepared.observe(True)
    prepared.fake_quantize(False)
    ranges.drop()
    world.heartbeat.begin("evaluate")
    for batch in batches:
        world.heartbeat.enter("evaluate")
        trees.call(prepared, batch.inputs)
    ranges.update(world.all_reduce(ranges.observed(), "max"), averaging=1.0)
    ranges.require_known()
    if settings.ranges != "min_max":
        prepared.observe(False)
        histograms = Histograms(ranges)
        with histograms.counting():
            for batch in batches:
                world.heartbeat.enter("evaluate")
                trees.call(prepared, batch.inputs)
        world.all_reduce(histograms.counts, "sum")
        if settings.ranges == "percentile":
            ranges.assign(*percentile_ranges(histograms, settings.percentile))
        else:
            ranges.assign(*least_error_ranges(histograms, ranges))
        prepared.observe(True)
    prepared.fake_quantize(True)
