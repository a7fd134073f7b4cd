"""What a quantization backend is: it makes a model that trains with fake quantization, and an integer model of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from dist_train import registry
from dist_train.config.stages import QATConfig, RuleConfig
from dist_train.errors import EXIT_CONFIG, QuantizationError
from dist_train.programs.program import Program
from dist_train.quantization.prepared import PreparedModel


@runtime_checkable
class QuantizationBackend(Protocol):
    """No method changes what it is given, draws from the global random generator, or communicates."""

    def check(self, model: nn.Module, rules: Sequence[RuleConfig] = (), example: Tensor | None = None) -> None:
        """What can be seen in the untrained model: called before the first stage, so that nobody trains for nothing.

        example: as of `prepare`; None where it was checked with one before, as on a resume. With one the check tries what may fail.

        Raises:
            QuantizationError: as `prepare`.
        """

    def prepare(self, model: nn.Module, example: Tensor, rules: Sequence[RuleConfig] = ()) -> PreparedModel:
        """Places fake-quantize modules.

        Args:
            model: the float model, on any device, in either mode.
            example: [B, C, H, W] (or what the model takes as its one input); only its shape, dtype and device count.
            rules: what to quantize otherwise, and what to leave in floating point; see `rules.resolve_rules`.

        Raises:
            QuantizationError: the model cannot be quantized this way; names the layer and says what to change.
        """

    def convert(self, prepared: PreparedModel) -> nn.Module:
        """The integer model, on the CPU, in eval mode."""

    def serialize(self, converted: nn.Module, example: Tensor) -> Program:
        """What `convert` returned, as bytes that are equal in every process; the batch size stays free."""


@contextmanager
def as_configuration() -> Iterator[None]:
    """A model that the backend cannot take is a mistake of the configuration: running it again will not help (exit code 78)."""
    try:
        yield
    except QuantizationError as error:
        error.exit_code = EXIT_CONFIG
        raise


def build_backend(config: QATConfig) -> QuantizationBackend:
    """The backend that a config names; it is given `engine` where its constructor takes it.

    Raises:
        QuantizationError: this torch or this machine does not have it.
    """
    factory = registry.quantization_backends.get(config.backend)
    takes_engine = "engine" in inspect.signature(factory).parameters
    backend: QuantizationBackend = factory(engine=config.engine) if takes_engine else factory()
    return backend
