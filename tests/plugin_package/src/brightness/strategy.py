"""A strategy."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

import dist_train


@dist_train.register_strategy("clamped")
class Clamped(dist_train.Strategy):
    """One process that clamps each element of a gradient to -0.01..0.01."""

    def wrap(self, model: nn.Module) -> nn.Module:
        self._model = model
        return model

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def warm_up_buckets(self, wrapped: nn.Module, inputs: torch.Tensor) -> None:
        return

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_value_(self._model.parameters(), 0.01)
