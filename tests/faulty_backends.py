"""Quantization backends that go wrong at convert, registered as a user would: --import tests.faulty_backends."""

from __future__ import annotations

import threading

from torch.fx import GraphModule

import dist_train
from dist_train.errors import QuantizationError
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.pt2e import PT2EBackend


@dist_train.register_quantization_backend("refusing")
class Refusing(PT2EBackend):
    def convert(self, prepared: PreparedModel) -> GraphModule:
        raise QuantizationError("layer conv7 cannot be converted", "skip it by a rule")


@dist_train.register_quantization_backend("endless")
class Endless(PT2EBackend):
    def convert(self, prepared: PreparedModel) -> GraphModule:
        threading.Event().wait()
        raise AssertionError("unreachable")


@dist_train.register_quantization_backend("drifting")
class Drifting(PT2EBackend):
    """Converts with scales that are far too small, so that everything is clipped."""

    def convert(self, prepared: PreparedModel) -> GraphModule:
        for quantizer in prepared.fake_quantizers:
            quantizer.scale.div_(64)
        converted = super().convert(prepared)
        for quantizer in prepared.fake_quantizers:
            quantizer.scale.mul_(64)
        return converted
