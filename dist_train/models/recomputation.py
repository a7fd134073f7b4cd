"""Keeps no activations of chosen modules for backward, which computes them anew ("activation checkpointing").

torch's checkpoint runs a forward again in backward. Buffers then are as they were before the forward, and what the
second forward does to them is dropped: statistics of batch norms and ranges move once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dist_train.errors import ModelError


class Recomputation:
    """Computes modules anew in backward, while it is on.

    Args:
        names: of modules of `model`, none inside another.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self._modules = {name: model.get_submodule(name) for name in names}
        for name, module in self._modules.items():
            if "forward" in module.__dict__:
                raise ModelError(
                    f"{name} has a forward of its own, besides its class's, which cannot be computed anew",
                    "leave it out of activation_checkpointing, or define forward in its class",
                )

    def turn(self, on: bool) -> None:
        """Turns it on or off. Off, the model is as it was, also for copies and conversions."""
        for name, module in self._modules.items():
            module.__dict__.pop("forward", None)
            if on:
                module.__dict__["forward"] = partial(_forward, name, module)


def _forward(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return recomputed(name, module.modules(), partial(type(module).forward, module), *args, **kwargs)


def recomputed(name: str, owners: Iterable[nn.Module], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls `run`, and lets backward call it again instead of keeping its activations.

    Args:
        name: of what runs, for messages.
        owners: modules whose own buffers `run` may read and change.

    Raises:
        ModelError: in backward, if an input has been changed in place since, so that backward would be wrong.
    """
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    again = _FormerBuffers(name, owners, inputs)
    return checkpoint(run, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **kwargs)


class _FormerBuffers(AbstractContextManager[None]):
    """In this context, buffers are copies of what they were when it was made."""

    def __init__(self, name: str, owners: Iterable[nn.Module], inputs: list[Tensor]) -> None:
        self._name = name
        self._inputs = [(each, each._version) for each in inputs]
        self._former: list[tuple[nn.Module, str, Tensor]] = [
            (owner, place, buffer.clone())
            for owner in owners
            for place, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._present: list[Tensor | None] = []

    def __enter__(self) -> None:
        if any(each._version != version for each, version in self._inputs):
            raise ModelError(
                f"an input of {self._name} is changed in place, in it or after it: backward would compute it anew "
                "from the changed one",
                "leave it out of activation_checkpointing, or write x = x + y for x += y, and inplace=False",
            )
        self._present = [owner._buffers[place] for owner, place, _ in self._former]
        for owner, place, buffer in self._former:
            owner._buffers[place] = buffer

    def __exit__(self, *_: object) -> None:
        for (owner, place, _buffer), present in zip(self._former, self._present, strict=True):
            owner._buffers[place] = present
