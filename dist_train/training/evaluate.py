"""Evaluates on all ranks, exactly: each sample counts once at any world size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from dist_train.data.arrays import Batch
from dist_train.data.loader import EvaluationLoader
from dist_train.distributed.world import World
from dist_train.errors import NonFiniteLossError
from dist_train.tasks import Task
from dist_train.tasks.agreement import same_share
from dist_train.training.evaluation_details import Details


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
    call: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[Batch],
    task: Task,
    world: World,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Evaluation:
    """Evaluates a model that is already in eval mode. Collective: every rank calls it with its own part of the data.

    Args:
        call: the model, or a function that runs it: inputs [B, ...] to outputs [B, ...].

    Returns:
        the evaluation. `metrics` has the task's metrics, `loss` (the mean) and `count`, the number of samples over all
            ranks. `skipped_samples` is the number that could not be decoded, absent if zero; `count` excludes them.

    Raises:
        NonFiniteLossError: on every rank, if the loss is NaN or infinite.
    """
    metrics = task.metrics().to(world.device)
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    details = Details(task, world.device)
    decisions = []
    world.heartbeat.begin("evaluate")
    for batch in batches:
        world.heartbeat.enter("evaluate")
        with autocast():
            outputs = call(batch.inputs)
        outputs = outputs.float()
        losses = task.loss(outputs, batch.targets)
        sums[0] += losses.double().sum()
        sums[1] += len(batch.targets)
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
    own = torch.cat(decisions).cpu() if decisions else torch.empty(0, dtype=torch.int64)
    counts = {"count": count}
    if isinstance(batches, EvaluationLoader) and count < batches.total:
        counts["skipped_samples"] = batches.total - count
    return Evaluation({**values, "loss": float(sums[0]) / max(count, 1), **counts}, own, details, bool(sums[2]))


def metric_names(task: Task) -> list[str]:
    """Returns the metrics of an evaluation without `count`: the names that `select_by` accepts."""
    return [*(str(name) for name in task.metrics().keys(keep_base=False)), "loss"]


def agreement(left: Evaluation, right: Evaluation, task: Task, world: World) -> float:
    """Returns the share of samples, over all ranks, on which two models agree; see `same_share`. Collective."""
    return same_share(task, left.decisions, right.decisions, world)
