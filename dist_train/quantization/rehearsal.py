"""Is there an int8 model of this model at all? Tried before training, as integer kernels take less than fake quantization does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dist_train.config_fit import RuleConfig
from dist_train.errors import QuantizationError
from dist_train.program import Program
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges


class _Backend(Protocol):
    def prepare(self, model: nn.Module, example: Tensor, rules: Sequence[RuleConfig] = ()) -> PreparedModel: ...

    def convert(self, prepared: PreparedModel) -> nn.Module: ...

    def serialize(self, converted: nn.Module, example: Tensor) -> Program: ...


def rehearse(backend: _Backend, model: nn.Module, example: Tensor, rules: Sequence[RuleConfig]) -> None:
    """Prepares, converts and serialises a copy of `model`, with ranges of no meaning, and runs it on batches of several sizes.

    example: as of `QuantizationBackend.prepare`.

    Raises:
        QuantizationError: one of these fails.
    """
    prepared = backend.prepare(model, example, rules).eval()
    ranges = Ranges(prepared)
    ends = torch.ones(len(ranges), device=example.device)
    ranges.assign(-ends, ends)  # any: those of an untrained model may not be finite
    with torch.no_grad():
        try:
            backend.serialize(backend.convert(prepared), example)
        except (AttributeError, RuntimeError, TypeError) as error:  # as torch.ao and its kernels fail
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise QuantizationError(
                f"the integer kernels cannot compute {type(model).__name__} on inputs {list(example.shape[1:])}: {first}",
                "--qat.backend pt2e; or change the operation: for a mean over maps of one pixel, x.flatten(1) instead",
            ) from error
