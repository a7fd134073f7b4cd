"""An optimizer and a schedule."""

from typing import Any

import torch
from torch.optim.lr_scheduler import LinearLR, LRScheduler

import dist_train


@dist_train.register_optimizer("normed_sgd")
class NormedSGD(torch.optim.Optimizer):
    """Steps along each gradient, shortened to a length of at most `longest`."""

    def __init__(self, params: Any, lr: float, longest: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "longest": longest, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    length = parameter.grad.norm().clamp(min=group["longest"])
                    parameter.sub_(parameter.grad * (group["longest"] / length), alpha=group["lr"])
        return None


@dist_train.register_schedule("falling")
def falling(optimizer: torch.optim.Optimizer, total_steps: int, last: float = 0.1) -> LRScheduler:
    """Falls linearly to the fraction `last`."""
    return LinearLR(optimizer, 1.0, last, total_iters=total_steps)
