"""Evaluates on all ranks, exactly: each sample counts once at any world size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dist_train import trees
from dist_train.data.arrays import Batch
from dist_train.data.loader import EvaluationLoader
from dist_train.distributed.world import World
from dist_train.errors import DataError, NonFiniteLossError
from dist_train.tasks import Task
from dist_train.tasks.agreement import same_share
from dist_train.training.evaluation_details import Details
from dist_train.training.outputs import in_float


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metrics: metrics over the samples of all ranks.
        decisions: this rank's decisions, [samples of this rank, ...], for comparing two models.
        details: this rank's part of the details that are not scalars.
    """

    metrics: dict[str, float | int]
    decisions: torch.Tensor
    details: Details | None = None
    stop: bool = False
    """True if any rank was asked to stop by the end of the evaluation."""


@torch.no_grad()
def evaluate(
    call: Callable[..., Any],
    batches: Iterable[Batch],
    task: Task,
    world: World,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Evaluation:
    """Evaluates a model that is already in eval mode. Collective: every rank calls it with its own part of the data.

    Args:
        call: the model, which takes a tree of inputs as `trees.call` gives it; or a function of that tree.

    Returns:
        the evaluation. `metrics` has the task's metrics, `loss` (the mean, by the task's own count if it has one) and
            `count`, the number of samples over all ranks. `skipped_samples` is the number that could not be decoded,
            absent if zero; `count` excludes them.

    Raises:
        NonFiniteLossError: on every rank, if the loss is NaN or infinite.
    """
    metrics = task.metrics().to(world.device)
    # Loss, samples, stop, and the count of losses that are not one a sample.
    sums = torch.zeros(3 + task.sums_losses, dtype=torch.float64, device=world.device)
    run = partial(trees.call, call) if isinstance(call, nn.Module) else call
    details = Details(task, world.device)
    decisions = []
    world.heartbeat.begin("evaluate")
    for batch in batches:
        world.heartbeat.enter("evaluate")
        with autocast():
            given = run(batch.inputs)
        rows = len(batch.ids)
        outputs = task.pick(in_float(given, rows, rows))
        losses = None
        if task.sums_losses:
            total, counted = task.summed_loss(outputs, batch.targets)
            sums[0] += total.double()
            sums[3] += counted
            losses = task.sample_losses(outputs, batch.targets)
        else:
            losses = task.loss(outputs, batch.targets)
            sums[0] += losses.double().sum()
        sums[1] += rows
        metrics.update(outputs, batch.targets)
        decisions.append(task.decide(outputs))
        details.update(batch, outputs, losses, decisions[-1])
    sums[2] = float(world.stop_wanted())
    world.all_reduce(sums, "sum")
    with warnings.catch_warnings():
        # torchmetrics warns on a rank without samples, which adds nothing, as it should.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        values = {name: float(value) for name, value in metrics.compute().items()}
    count = int(sums[1])
    if not math.isfinite(float(sums[0])):
        raise NonFiniteLossError(
            "the loss of the evaluation is not finite",
            "lower the learning rate or set clip_grad_norm; the checkpoints of earlier epochs are whole",
        )
    own = _joined(decisions)
    counts = {"count": count}
    if isinstance(batches, EvaluationLoader) and count < batches.total:
        counts["skipped_samples"] = batches.total - count
    loss = float(sums[0]) / (float(sums[3]) or 1.0 if task.sums_losses else max(count, 1))
    return Evaluation({**values, "loss": loss, **counts}, own, details, bool(sums[2]))


def _joined(decisions: list[torch.Tensor]) -> torch.Tensor:
    if not decisions:
        return torch.empty(0, dtype=torch.int64)
    shapes = {tuple(each.shape[1:]) for each in decisions}
    if len(shapes) > 1:
        raise DataError(
            f"the task's decide gives decisions of {' and '.join(str(list(shape)) for shape in sorted(shapes)[:2])} a "
            "sample, by batch",
            "let it give one shape, for example padded to a length that no row exceeds",
        )
    return torch.cat(decisions).cpu()


def metric_names(task: Task) -> list[str]:
    """Returns the metrics of an evaluation without `count`: the names that `select_by` accepts."""
    return [*map(str, task.metrics()), "loss"]


def agreement(left: Evaluation, right: Evaluation, task: Task, world: World) -> float:
    """Returns the share of samples, over all ranks, on which two models agree; see `same_share`. Collective."""
    return same_share(task, left.decisions, right.decisions, world)
