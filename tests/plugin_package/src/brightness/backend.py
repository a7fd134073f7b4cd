"""A quantization backend."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import dist_train
from dist_train.config.stages import RuleConfig
from dist_train.quantization.pt2e.backend import PT2EBackend


@dist_train.register_quantization_backend("float_head")
class FloatHead(PT2EBackend):
    """The pt2e backend, with the layer named head left in floating point."""

    def prepare(self, model: nn.Module, example: Tensor, rules: Sequence[Any] = ()) -> Any:
        return super().prepare(model, example, [*rules, RuleConfig(match="head", skip=True)])
