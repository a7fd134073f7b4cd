"""Trains on one device in one process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from dist_train.strategies.base import Strategy
from dist_train.trees import Tree


class Single(Strategy):
    """Leaves the model unwrapped."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def warm_up_buckets(self, wrapped: nn.Module, inputs: Tree) -> None:
        return
