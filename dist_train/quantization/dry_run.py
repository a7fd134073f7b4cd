"""Is there an int8 model of this model at all? Tried before training, as libraries refuse more than can be seen beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dist_train.config.stages import RuleConfig
from dist_train.errors import QuantizationError
from dist_train.programs.program import Program
from dist_train.quantization.error_location import where_in_graph
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from dist_train.quantization.rules import resolve_rules, skipped_modules

# As we, torchao, torch.ao and their kernels fail.
FAILURES = (QuantizationError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class _Backend(Protocol):
    def prepare(self, model: nn.Module, example: Tensor, rules: Sequence[RuleConfig] = ()) -> PreparedModel: ...

    def convert(self, prepared: PreparedModel) -> nn.Module: ...

    def serialize(self, converted: nn.Module, example: Tensor) -> Program: ...


def rehearse(
    backend: _Backend,
    model: nn.Module,
    example: Tensor,
    rules: Sequence[RuleConfig],
    instead: str = "pt2e",
    run: bool = True,
) -> None:
    """Prepares and converts a copy of `model`, with ranges of no meaning.

    Args:
        example: as of `QuantizationBackend.prepare`.
        instead: backends to try where this one fails.
        run: whether to serialise the result, too, and run it on batches of several sizes.

    Raises:
        QuantizationError: one of these fails.
    """
    try:
        prepared = backend.prepare(model, example, rules).eval()
    except QuantizationError:
        raise
    except FAILURES as error:
        layer, place = where_in_graph(error)
        skipped = layer in skipped_modules(resolve_rules(model, rules))
        rule = (
            f"--qat.rules '[{{match: \"{layer}\", skip: true}}]'" if layer and not skipped else "change what is named"
        )
        raise QuantizationError(
            f"{type(model).__name__} cannot be prepared for quantization{place}: {_first_line(error)}",
            f"{rule}, or --qat.backend {instead}",
        ) from error
    ranges = Ranges(prepared)
    ends = torch.ones(len(ranges), device=example.device)
    ranges.assign(-ends, ends)  # any: those of an untrained model may not be finite
    with torch.no_grad():
        try:
            converted = backend.convert(prepared)
            if run:
                backend.serialize(converted, example)
        except QuantizationError:
            raise
        except FAILURES as error:
            raise QuantizationError(
                f"the integer kernels cannot compute {type(model).__name__} on inputs {list(example.shape[1:])}: "
                f"{_first_line(error)}",
                f"--qat.backend {instead}; or change the operation: for a mean over maps of one pixel, x.flatten(1) instead",
            ) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
