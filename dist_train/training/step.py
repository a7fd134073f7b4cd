"""One rank's share of a training step: forward and backward of its micro-batches."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from dist_train import trees
from dist_train.data.loader import MicroBatch, StepBatch
from dist_train.models.batch_norm import synchronised
from dist_train.strategies.base import Strategy, kept_buffers
from dist_train.tasks import Task
from dist_train.training.outputs import in_float, nothing_of
from dist_train.training.reduction import StepReduction, StepSums
from dist_train.trees import map_leaves, plain, rows_of


def train_step(model: nn.Module, batch: StepBatch, task: Task, strategy: Strategy, reduction: StepReduction) -> None:
    """Runs forward and backward on this rank's share; gradients are those of the global batch's mean loss (law 2).

    DDP averages gradients over ranks, so the local sum of losses is multiplied by the world size. Where the task counts
    its losses otherwise than by samples, all ranks' count is known only then: `rescale` the gradients afterwards.

    Args:
        reduction: is begun before the last backward, so that it travels meanwhile; `finish` it afterwards.
    """
    scale, heartbeat = strategy.world.world_size / batch.global_count, strategy.world.heartbeat
    loss_sum = score_sum = torch.zeros((), device=strategy.world.device)
    count = torch.zeros((), device=strategy.world.device) if task.sums_losses else None
    for number, micro in enumerate(batch.micro_batches, start=1):
        last = number == len(batch.micro_batches)
        kept = kept_buffers(model) if micro.spare else nullcontext()
        with kept, nullcontext() if last else strategy.no_sync(model):
            heartbeat.enter("forward")
            with strategy.autocast(), synchronised(strategy.world, micro.rows):
                outputs = trees.call(model, micro.inputs)
            if micro.rows:
                real = task.pick(in_float(outputs, rows_of(micro.inputs), micro.rows))
                loss, counted = _summed_loss(task, real, micro)
                score_sum = score_sum + task.score(map_leaves(_detached, real), micro.targets).sum()
                count = None if count is None else count + counted
                if not isinstance(outputs, torch.Tensor):
                    # DDP waits for a gradient of each output; what the task does not take, as a second head, gets 0.
                    loss = loss + nothing_of(plain(outputs))
            else:
                # A rank without rows still joins the gradients' all-reduce, with zeros.
                loss = nothing_of(plain(outputs))
            loss_sum = loss_sum + loss.detach()
            scaled = loss * scale
            if last:
                sums = StepSums(loss_sum, score_sum, batch.rows, batch.global_count, count)
                scaled = reduction.begin(sums, scaled, strategy)
            heartbeat.enter("backward")
            strategy.backward(scaled)
    strategy.require_all_reduced(model)


def _summed_loss(task: Task, outputs: Any, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor | int]:
    """Returns the sum of the rows' losses, float [], and its count; that of rows, unless the task counts otherwise.

    A mixed row weights the losses of its own and its partner's target.
    """
    if task.sums_losses:
        total, count = task.summed_loss(outputs, micro.targets)
        return total, count.detach() if isinstance(count, torch.Tensor) else count
    losses = task.loss(outputs, micro.targets)
    if micro.partner_targets is not None:
        losses = micro.weight * losses + (1 - micro.weight) * task.loss(outputs, micro.partner_targets)
    return losses.sum(), micro.rows


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
