"""Trains on one device in one process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from dist_train.strategies.base import Strategy


class Single(Strategy):
    """Leaves the model unwrapped."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def warm_up_buckets(self, wrapped: nn.Module, inputs: torch.Tensor) -> None:
        return
