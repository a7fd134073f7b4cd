"""Prepared model: a model that trains with fake quantization, with one interface for stages, hooks and the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from dist_train.quantization.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize


class PreparedModel(nn.Module, ABC):
    """A module with fake quantization, made by a backend. State, copies and modes work as for any module.

    In training mode dropout is off, unless `keep_dropout()` was called.

    Attributes:
        batch_norms: the batch norms with running statistics, in the model's order: from the float model's name, such as
            `bn1` (whose variance is `bn1.running_var`), to the name here.
        batch_norm_frozen: True after `freeze_batch_norm()`.
    """

    batch_norms: dict[str, str]
    batch_norm_frozen: bool

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm_frozen = False

    @property
    def fake_quantizers(self) -> list[ActivationFakeQuantize]:
        """The activations' fake-quantize modules, in the model's order."""
        return [module for module in self.modules() if isinstance(module, ActivationFakeQuantize)]

    @property
    @abstractmethod
    def fixed_fake_quantizers(self) -> list[nn.Module]:
        """Fake-quantize modules with a fixed range, as for a sigmoid: torch.ao's FixedQParamsFakeQuantize."""

    @abstractmethod
    def literals(self) -> Iterator[tuple[str, float]]:
        """Yields the numbers in the model, by the float model's names: `bn1.eps`, `bn1.momentum`, `dropout.p`.

        A number that is written in several places is yielded once for each.
        """

    def observe(self, on: bool) -> None:
        """Turns the recording of activation ranges on or off, for both modes. Turn it off around an evaluation."""
        for module in self.fake_quantizers:
            module.observing = on

    @contextmanager
    def observing(self, on: bool) -> Iterator[None]:
        """As `observe`, inside the block only."""
        before = [module.observing for module in self.fake_quantizers]
        self.observe(on)
        try:
            yield
        finally:
            for module, was in zip(self.fake_quantizers, before, strict=True):
                module.observing = was

    def fake_quantize(self, on: bool) -> None:
        """Turns fake quantization on or off. While it is off, the model computes the float model's outputs."""
        for module in self.modules():
            if isinstance(module, (ActivationFakeQuantize, WeightFakeQuantize)):
                module.enabled = on
        for fixed in self.fixed_fake_quantizers:
            fixed.enable_fake_quant(on)  # type: ignore[operator]

    @abstractmethod
    def keep_dropout(self) -> None:
        """Turns dropout on in training mode, from now on.

        Raises:
            QuantizationError: the model drops out by a function that cannot be switched any more.
        """

    @abstractmethod
    def batch_moments(self) -> AbstractContextManager[None]:
        """As `dist_train.models.batch_norm.batch_moments`, for this model. No ranges are observed inside the block."""

    def freeze_batch_norm(self) -> None:
        """Makes training normalize by the running statistics and leave them unchanged. Gradients still flow."""
        self.batch_norm_frozen = True
        self.train(self.training)

    def integer_weights(self) -> Collection[str] | None:
        """Returns the float model's names of the parameters that conversion turns into integers.

        None, the default, for a backend that does not tell.
        """
        return None

    def layer_sqnr(self, converted: nn.Module, inputs: Tensor) -> dict[str, float]:
        """Compares each layer of `converted` with the same layer here; see `layer_sqnr.layer_sqnr`, which calls this.

        It may change this model, which is a copy on the CPU, in eval mode. An empty dict, the default, for a backend
        that does not tell.
        """
        return {}
