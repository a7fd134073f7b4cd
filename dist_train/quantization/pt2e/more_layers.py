"""Layers with weights that X86InductorQuantizer leaves in floating point: 1-d and transposed convolutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from dist_train.quantization.fake_quantize import TransposedWeightFakeQuantize
from dist_train.quantization.pt2e.torchao_parts import QuantizationAnnotation, QuantizationSpec

aten = torch.ops.aten
_TRANSPOSED = {
    aten.conv1d.default: False,
    aten.conv_transpose1d.default: True,
    aten.conv_transpose2d.input: True,
}
_GROUPS = 6  # the place of `groups` among a transposed convolution's arguments


def annotate_more(
    module: GraphModule,
    activation: QuantizationSpec,
    weight: QuantizationSpec,
    stays_float: Callable[[list[Node]], bool],
) -> None:
    """Marks the convolutions that X86InductorQuantizer left unmarked, in place.

    A transposed convolution's output channels are the second dimension of its weight. Those with groups are left alone:
    their channels are not of one dimension.
    """
    transposed = dataclasses.replace(weight, observer_or_fake_quant_ctr=TransposedWeightFakeQuantize, ch_axis=1)
    for node in module.graph.nodes:
        if node.target not in _TRANSPOSED or "quantization_annotation" in node.meta or stays_float([node]):
            continue
        if _TRANSPOSED[node.target] and node.args[_GROUPS : _GROUPS + 1] not in ((), (1,)):
            continue
        specs = {node.args[0]: activation, node.args[1]: transposed if _TRANSPOSED[node.target] else weight}
        node.meta["quantization_annotation"] = QuantizationAnnotation(input_qspec_map=specs, _annotated=True)
