"""Freezes parts of a model in some epochs: no gradients, and batch norms that keep their statistics."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from dist_train.models.batch_norm import hold_batch_norms
from dist_train.quantization.prepared import PreparedModel
from dist_train.training.parts import Parts
from dist_train.training.reduction import StepReduction


class Freezing:
    """The frozen parts of a stage's model.

    What is frozen follows from the epoch alone, so that a resumed run equals an uninterrupted one.

    Attributes:
        active: True while the parts are frozen.
        parameters: the parameters that `active` keeps from learning.

    Args:
        names: from the names of the model's parameters to the float model's, by which `parts` names them.
        until: epoch from which on the parts learn; None: never.
    """

    def __init__(
        self, model: nn.Module, reduction: StepReduction, parts: Parts, names: Mapping[str, str], until: int | None
    ) -> None:
        self.active = False
        self._parts, self._until, self._reduction = parts, until, reduction
        self._models = [model]
        # By name: a strategy may put other tensors in their places.
        self._names = [
            name
            for name, each in model.named_parameters()
            if names.get(name, name) in parts.frozen and each.requires_grad
        ]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self._models[0].get_parameter(name) for name in self._names]

    @property
    def for_good(self) -> bool:
        """True where the parts never learn."""
        return self._until is None

    def __len__(self) -> int:
        return len(self._names) + len(self._parts.batch_norms)

    def __str__(self) -> str:
        batch_norms = len(self._parts.batch_norms)
        also = f" and the statistics of {batch_norms} batch norms" if batch_norms else ""
        return f"{len(self._names)} parameters{also}"

    def follow(self, average: nn.Module) -> None:
        """Lets the batch norms of the model's moving average follow."""
        self._models.append(average)

    def enter(self, epoch: int) -> bool:
        """Freezes or unfreezes the parts for an epoch, counted from 0; returns whether that changed anything."""
        return self._set(bool(len(self)) and (self._until is None or epoch < self._until))

    def release(self) -> None:
        """Unfreezes the parts, at the end of the stage."""
        self._set(False)

    def _set(self, active: bool) -> bool:
        if active == self.active:
            return False
        self.active = active
        for parameter in self.parameters:
            parameter.requires_grad_(not active)
        held = self._parts.batch_norms if active else frozenset()
        here = list(held)
        for model in self._models:
            if isinstance(model, PreparedModel):
                model.hold_batch_norms(held)
                here = [model.batch_norms[name] for name in held if name in model.batch_norms]
            else:
                hold_batch_norms(model, held)
        self._reduction.leave_out(here)
        return True
