"""Builds torch's optimizers with parameter groups, and its learning-rate schedules with warm-up."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR, StepLR

from dist_train.config.stages import OptimConfig, ScheduleConfig, steps_in

_WARMUP_START = 0.01


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Builds SGD, Adam or AdamW over the trainable parameters.

    One-dimensional parameters (norms, biases) get no weight decay unless `decay_norm_and_bias` is set (He et al. 2019,
    arXiv:1812.01187).
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.dim() > 1 or config.decay_norm_and_bias else spared).append(parameter)
    groups = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((decayed, config.weight_decay), (spared, 0.0))
        if params
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    adam = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return adam(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def build_schedule(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, total_steps: int, steps_per_epoch: int
) -> LRScheduler:
    """Builds a schedule over `total_steps` optimizer steps: linear warm-up, then constant, step, cosine or linear."""
    warmup_steps = steps_in(config.warmup, total_steps)
    rest = max(1, total_steps - warmup_steps)
    after: LRScheduler
    if config.name == "constant":
        after = ConstantLR(optimizer, factor=1.0, total_iters=0)
    elif config.name == "step":
        after = StepLR(optimizer, max(1, round(config.step_epochs * steps_per_epoch)), config.gamma)
    elif config.name == "cosine":
        after = CosineAnnealingLR(optimizer, rest, eta_min=config.final * optimizer.defaults["lr"])
    else:
        after = LinearLR(optimizer, start_factor=1.0, end_factor=config.final, total_iters=rest)
    if warmup_steps == 0:
        return after
    rise = LinearLR(optimizer, start_factor=_WARMUP_START, end_factor=1.0, total_iters=warmup_steps)
    return SequentialLR(optimizer, [rise, after], milestones=[warmup_steps])
