"""Checks and changes of a backend's copy of the float model, before fake quantization is placed."""

from __future__ import annotations

import itertools
import keyword
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from dist_train.errors import QuantizationError

# QAT divides by the batch norm's weight: a weight of exactly zero (a zero-initialized residual branch) would give NaN.
_SMALLEST_WEIGHT = 1e-8


@contextmanager
def quietly() -> Iterator[None]:
    """Silences warnings of prototype and deprecated APIs, and restores the global random state that they change."""
    # They draw on the CPU, whatever the model's device.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield


def refuse_untracked_statistics(name: str) -> QuantizationError:
    """Returns the error for the batch norm `name`, which always normalizes by its batch."""
    return QuantizationError(
        f"{name}: a batch norm without running statistics cannot be folded: its output depends on the whole batch",
        "build it with track_running_stats=True, or use nn.GroupNorm, and train again",
    )


def refuse_cumulative_average(model: nn.Module) -> None:
    """Raises QuantizationError for a batch norm with momentum=None, by name."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.momentum is None:
            raise QuantizationError(
                f"{name}: a batch norm with momentum=None (a cumulative average) cannot be folded for training",
                f"set {name}.momentum to a number, such as 0.1",
            )


def refuse_names(model: nn.Module, taken: Container[str] = (), instead: str = "") -> None:
    """Raises QuantizationError for a module or tensor whose name no traced model can have.

    Args:
        taken: names at the top of the model that its traced one has itself.
        instead: what to type for a backend that takes such a name, "" for none.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    for name in (name for name, _ in itertools.chain(model.named_modules(), tensors)):
        word = next((part for part in name.split(".") if keyword.iskeyword(part)), None)
        if word is not None:
            raise QuantizationError(
                f"{name}: the code of a traced model cannot hold the name `{word}`, a keyword of Python",
                "rename it in the model",
            )
        top = name.partition(".")[0]
        if top in taken:
            raise QuantizationError(
                f"the model has an attribute named `{top}`, which its traced graph has itself",
                f"rename it in the model{instead}",
            )


def float_literals(model: nn.Module) -> dict[str, float]:
    """Returns the numbers of a float model that preparing must keep: `bn1.eps`, `bn1.momentum`, `dropout.p`."""
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.momentum is not None:
            found |= {f"{name}.eps": module.eps, f"{name}.momentum": module.momentum}
        elif isinstance(module, _DropoutNd):
            found[f"{name}.p"] = module.p
    return found


@torch.no_grad()
def keep_invertible(weight: Tensor) -> None:
    """Moves entries of a batch norm's weight away from zero, in place."""
    smallest = torch.full_like(weight, _SMALLEST_WEIGHT).copysign(weight)
    weight.copy_(torch.where(weight.abs() < _SMALLEST_WEIGHT, smallest, weight))
