"""Dry run of a backend before training: libraries refuse more models than checks can foresee."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_train.config.stages import RuleConfig
from dist_train.errors import QuantizationError, first_line
from dist_train.quantization.backend import QuantizationBackend
from dist_train.quantization.error_location import graph_error_location
from dist_train.quantization.ranges import Ranges
from dist_train.quantization.rules import resolve_rules, skipped_modules

FAILURES = (QuantizationError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors that our backends, torchao, torch.ao and their kernels raise for a model that they cannot take."""


def dry_run(
    backend: QuantizationBackend,
    model: nn.Module,
    example: Tensor,
    rules: Sequence[RuleConfig],
    instead: str = "pt2e",
    serialize: bool = True,
) -> None:
    """Prepares, converts and runs a copy of `model`, with meaningless ranges.

    Args:
        example: as of `QuantizationBackend.prepare`.
        instead: backends to name in the hint.
        serialize: serializes the result, which runs it on batches of several sizes; else it is run on `example` only.

    Raises:
        QuantizationError: one of these steps fails.
    """
    try:
        prepared = backend.prepare(model, example, rules).eval()
    except QuantizationError:
        raise
    except FAILURES as error:
        layer, place = graph_error_location(error)
        skipped = layer in skipped_modules(resolve_rules(model, rules))
        rule = (
            f"--qat.rules '[{{match: \"{layer}\", skip: true}}]'" if layer and not skipped else "change what is named"
        )
        raise QuantizationError(
            f"{type(model).__name__} cannot be prepared for quantization{place}: {first_line(error)}",
            f"{rule}, or --qat.backend {instead}",
        ) from error
    ranges = Ranges(prepared)
    ends = torch.ones(len(ranges), device=example.device)
    ranges.assign(-ends, ends)  # arbitrary: the ranges of an untrained model may not be finite
    with torch.no_grad():
        try:
            converted = backend.convert(prepared)
            if serialize:
                backend.serialize(converted, example)
            else:
                converted(example.cpu())
        except QuantizationError:
            raise
        except FAILURES as error:
            raise QuantizationError(
                f"the integer kernels cannot compute {type(model).__name__} on inputs {list(example.shape[1:])}: "
                f"{first_line(error)}",
                f"--qat.backend {instead}; or change the operation: for a mean over maps of one pixel, "
                "x.flatten(1) instead",
            ) from error
