"""Checks the gate `gradients`: with fake quantization off, the prepared model must learn as the float model does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_train.data.arrays import Batch
from dist_train.data.loader import EvaluationLoader
from dist_train.quantization import gradients
from dist_train.quantization.gradients import FLOAT32_BOUND, in_lines
from dist_train.quantization.prepared import PreparedModel
from dist_train.run_dir.gates import Gate
from dist_train.stages.context import Context
from dist_train.tasks import Task
from dist_train.trees import plain

_ROWS = 16


def gate_gradients(context: Context, prepared: PreparedModel) -> None:
    """Checks the gradients of a loss on real rows for every parameter, with fake quantization off.

    The prepared model's parameters must equal the float model's, as before the first step.

    Raises:
        GateError: on every rank, if a gradient differs, or only one of the models has it.
    """
    source = context.data.source(context.data.splits.train, 0)
    batch = next(iter(EvaluationLoader(source, _ROWS, 1, 0, _ROWS)))
    prepared.fake_quantize(False)
    prepared.observe(False)
    worst, lines, dtype = gradient_difference(prepared, context.model, batch, context.task)
    prepared.fake_quantize(True)
    prepared.observe(True)
    bound = context.config.qat.gradient_bound if dtype is torch.float64 else FLOAT32_BOUND
    context.gates.check(
        Gate(
            name="gradients",
            value=worst,
            bound=bound,
            passed=worst <= bound,
            hint="the prepared model would train otherwise than the float model: it lost a torch.no_grad(), an "
            "autograd.Function, a train() of the model's own or a subclass of BatchNorm; use another --qat.backend, "
            "or write that part of the model otherwise",
            detail=in_lines(lines),
        )
    )


def gradient_difference(
    prepared: PreparedModel, model: nn.Module, batch: Batch, task: Task
) -> tuple[float, list[str], torch.dtype]:
    """As `gradients.gradient_difference`, of the task's mean loss on `batch`."""

    def loss(outputs: Any) -> Tensor:
        picked = task.pick(plain(outputs))
        if not task.sums_losses:
            return task.loss(picked, batch.targets).mean()
        total, count = task.summed_loss(picked, batch.targets)
        return total / max(float(count), 1.0)

    return gradients.gradient_difference(prepared, model, batch.inputs, loss)
