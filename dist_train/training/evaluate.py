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
    """Returns the share of samples, over all ranks, on which two models agree. Collective.

    Float decisions are compared in units of the standard deviation of the decisions of `right` over all samples.
    """
    ours, theirs = left.decisions, right.decisions
    spread = _spread(theirs, world)
    if spread is not None and len(theirs):
        ours, theirs = ours / spread, theirs / spread
    same = torch.tensor(
        [float(task.agree(ours, theirs).sum()) if len(theirs) else 0.0, float(len(theirs))],
        dtype=torch.float64,
        device=world.device,
    )
    world.all_reduce(same, "sum")
    return float(same[0] / same[1].clamp(min=1))


def _spread(decisions: torch.Tensor, world: World) -> torch.Tensor | None:
    """Returns each output's standard deviation over all samples, [...] on the CPU; None for integer decisions."""
    # A rank without samples does not know the shape of the decisions.
    shapes = world.gather(list(decisions.shape[1:]) if decisions.is_floating_point() and len(decisions) else None)
    shape = next((shape for shape in shapes if shape is not None), None)
    if shape is None:
        return None
    sums = torch.zeros(3, *shape, dtype=torch.float64, device=world.device)
    if len(decisions):
        values = decisions.double()
        sums[0], sums[1], sums[2] = values.sum(0), values.square().sum(0), len(values)
    total, squares, count = world.all_reduce(sums, "sum").cpu()
    deviation = (squares / count - (total / count) ** 2).clamp(min=0).sqrt()
    # An output that is constant must be equal in the other model, up to rounding.
    return deviation.clamp(min=torch.finfo(torch.float32).eps).float()
