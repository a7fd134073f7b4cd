"""Interface of a quantization backend: from a float model to one with fake quantization, and from that to integers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import nn

from dist_train import registry
from dist_train.config.stages import QATConfig, RuleConfig
from dist_train.errors import EXIT_CONFIG, QuantizationError
from dist_train.programs.program import Program
from dist_train.programs.signature import Dynamic
from dist_train.quantization.prepared import PreparedModel
from dist_train.trees import Tree

_METHODS = ("check", "prepare", "convert", "serialize")


@runtime_checkable
class QuantizationBackend(Protocol):
    """A backend. No method changes its arguments, draws from the global random generator, or communicates.

    Everything else that a stage asks of a backend, such as the quality of each layer, is a method of `PreparedModel`.
    """

    def check(self, model: nn.Module, rules: Sequence[RuleConfig] = (), example: Tree | None = None) -> None:
        """Checks the untrained model before the first stage, so that nobody trains in vain.

        Args:
            example: as of `prepare`. With an example, conversion is tried on a copy. None where that was done before,
                as on a resume.

        Raises:
            QuantizationError: as `prepare`.
        """

    def prepare(self, model: nn.Module, example: Tree, rules: Sequence[RuleConfig] = ()) -> PreparedModel:
        """Places fake-quantize modules.

        Args:
            model: the float model, on any device, in either mode.
            example: tree of real rows [B, ...] as the model takes it, on its device. Of floats only shape and dtype
                count; integers may be indices.
            rules: exceptions for modules: other settings, or floating point; see `rules.resolve_rules`.

        Raises:
            QuantizationError: the model cannot be quantized this way; names the layer and says what to change.
        """

    def convert(self, prepared: PreparedModel) -> nn.Module:
        """Converts a prepared model to an integer model, on the CPU, in eval mode."""

    def serialize(self, converted: nn.Module, example: Tree) -> Program:
        """Serializes the result of `convert`: equal bytes in every process, and a dynamic batch size.

        Dimensions that vary besides, which `build_backend` gave the constructor, are dynamic too.
        """


@contextmanager
def as_configuration() -> Iterator[None]:
    """Gives QuantizationErrors the exit code of the configuration (78): running the command again will not help."""
    try:
        yield
    except QuantizationError as error:
        error.exit_code = EXIT_CONFIG
        raise


def build_backend(config: QATConfig, dynamic: Dynamic | None = None) -> QuantizationBackend:
    """Builds the backend that a config names, with `engine`, `gradient_bound`, `dynamic` as its constructor takes them.

    dynamic: dimensions of the inputs that vary besides the batch.

    Raises:
        QuantizationError: this torch or this machine does not have it, or it lacks a method of `QuantizationBackend`.
    """
    factory = registry.quantization_backends.get(config.backend)
    taken = inspect.signature(factory).parameters
    settings = {"engine": config.engine, "gradient_bound": config.gradient_bound, "dynamic": dynamic or {}}
    backend: QuantizationBackend = factory(**{name: value for name, value in settings.items() if name in taken})
    lacking = [name for name in _METHODS if not callable(getattr(backend, name, None))]
    if lacking:
        error = QuantizationError(
            f"the quantization backend {config.backend} has no method {' and no '.join(lacking)}",
            f"a backend has {', '.join(_METHODS)}: see dist_train/quantization/backend.py",
        )
        error.exit_code = EXIT_CONFIG
        raise error
    return backend
