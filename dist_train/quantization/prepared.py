"""Prepared model: a model that trains with fake quantization, with one interface for stages, hooks and the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from dist_train.errors import QuantizationError
from dist_train.models.batch_norm import hold_batch_norms
from dist_train.quantization.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize
from dist_train.trees import Tree


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

    def hold_batch_norms(self, names: Collection[str]) -> None:
        """Makes these batch norms, by the float model's names, keep their statistics in training; others go on."""
        hold_batch_norms(self, [self.batch_norms[name] for name in names if name in self.batch_norms])

    def recompute(self, names: Sequence[str]) -> None:
        """Makes backward compute these layers anew, by the float model's names; none, to keep all activations.

        Raises:
            QuantizationError: the backend cannot.
        """
        if names:
            raise QuantizationError(
                f"a {type(self).__name__} cannot compute layers anew in backward",
                "leave activation_checkpointing out of qat, or --qat.backend pt2e",
            )

    def float_names(self) -> dict[str, str]:
        """Returns the float model's name of each parameter, by the name here. The default: they are the same."""
        return {name: name for name, _ in self.named_parameters()}

    def modules_of_blocks(self, names: Sequence[str]) -> list[list[str]]:
        """Returns the modules here that make up these blocks of the float model: those whose forward is called.

        None, the default, for a backend that computes by a graph alone.
        """
        return []

    def integer_weights(self) -> Collection[str] | None:
        """Returns the float model's names of the parameters that conversion turns into integers.

        None, the default, for a backend that does not tell.
        """
        return None

    def layer_sqnr(self, converted: nn.Module, inputs: Tree) -> dict[str, float]:
        """Compares each layer of `converted` with the same layer here; see `layer_sqnr.layer_sqnr`, which calls this.

        It may change this model, which is a copy on the CPU, in eval mode. An empty dict, the default, for a backend
        that does not tell.
        """
        return {}
