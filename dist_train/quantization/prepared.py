"""A model that trains with fake quantization: what stages, hooks and the loop ask of it, whichever backend made it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from dist_train.quantization.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize


class PreparedModel(nn.Module, ABC):
    """A module like any other: state, copies, modes. In training mode dropout is off, unless `keep_dropout()` was called.

    Attributes:
        batch_norms: the batch norms with running statistics, in the model's order: the float model's name for each, such as `bn1`
            (then `bn1.running_var`), and the name here.
        batch_norm_frozen: whether `freeze_batch_norm()` was called.
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
        """Those of outputs whose range is known beforehand, such as a sigmoid's: torch.ao's FixedQParamsFakeQuantize."""

    @abstractmethod
    def literals(self) -> Iterator[tuple[str, float]]:
        """Numbers written into the model, by the float model's names: `bn1.eps`, `bn1.momentum`, `dropout.p`; each place once."""

    def observe(self, on: bool) -> None:
        """Whether forward passes record the ranges of activations, in either mode: turn it off around an evaluation."""
        for module in self.fake_quantizers:
            module.observing = on

    @contextmanager
    def observing(self, on: bool) -> Iterator[None]:
        """As `observe`, in this context only."""
        before = [module.observing for module in self.fake_quantizers]
        self.observe(on)
        try:
            yield
        finally:
            for module, was in zip(self.fake_quantizers, before, strict=True):
                module.observing = was

    def fake_quantize(self, on: bool) -> None:
        """Whether activations and weights are quantized. Off, the model computes what the float model does."""
        for module in self.modules():
            if isinstance(module, (ActivationFakeQuantize, WeightFakeQuantize)):
                module.enabled = on
        for fixed in self.fixed_fake_quantizers:
            fixed.enable_fake_quant(on)  # type: ignore[operator]

    @abstractmethod
    def keep_dropout(self) -> None:
        """From now on dropout is on in training mode.

        Raises:
            QuantizationError: the model drops out by a function that cannot be switched any more.
        """

    @abstractmethod
    def batch_moments(self) -> AbstractContextManager[None]:
        """See `dist_train.models.batch_norm.batch_moments`, which this is for a prepared model. It observes no ranges."""

    def freeze_batch_norm(self) -> None:
        """From now on training, too, normalises by the running statistics and leaves them alone. Gradients still flow."""
        self.batch_norm_frozen = True
        self.train(self.training)
