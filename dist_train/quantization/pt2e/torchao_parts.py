"""The parts of torchao that pt2e uses, imported after its version and torch's were checked.

Importing this module raises BackendVersionError where another version is installed: its parts may be elsewhere or gone.
"""
# ruff: noqa: E402

from __future__ import annotations

from dist_train.quantization.versions import check_versions

check_versions()

from torchao.quantization.pt2e import FakeQuantizeBase, graph_utils, qat_utils
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, x86_inductor_quantizer
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from dist_train.quantization.fake_quantize import ActivationFakeQuantize, WeightFakeQuantize

__all__ = [
    "QuantizationAnnotation",
    "QuantizationSpec",
    "X86InductorQuantizer",
    "convert_pt2e",
    "get_default_x86_inductor_quantization_config",
    "graph_utils",
    "prepare_qat_pt2e",
    "qat_utils",
    "x86_inductor_quantizer",
]

# convert_pt2e finds fake-quantize modules by this base.
for ours in (ActivationFakeQuantize, WeightFakeQuantize):
    FakeQuantizeBase.register(ours)
