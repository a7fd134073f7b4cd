"""Small converted (Q/DQ) models for tests, made by torchao's own flow and independent of our quantization."""

from __future__ import annotations

import copy
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

SHAPE = (3, 16, 16)


def float_net(channels_last: bool = False, width: int = 16) -> nn.Module:
    """A float net in eval mode with seeded weights; the global RNG is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            head := nn.Linear(2 * width, 10),
        )
    head.weight.data *= 8  # logits far enough apart for a stable argmax
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return net.eval().to(memory_format=memory_format)


def images(count: int, seed: int = 1) -> Tensor:
    """float32 [count, 3, 16, 16] in [0, 1)."""
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def _dynamic_batch() -> tuple[dict[int, Dim]]:
    return ({0: Dim("batch", min=1)},)


def converted_net(model: nn.Module) -> nn.Module:
    """`model` after post-training quantization: a graph of quantize and dequantize operators."""
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    graph = export(copy.deepcopy(model), (images(8),), dynamic_shapes=_dynamic_batch(), strict=True)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = quantize_pt2e.prepare_pt2e(graph.module(check_guards=False), quantizer)
    prepared(images(64))
    # For a batch norm that stays in the graph it exports 96 patterns of QAT (15 s), and here is none.
    with patch.object(quantize_pt2e, "_fold_conv_bn_qat", lambda module: module):
        return quantize_pt2e.convert_pt2e(prepared)


def program_of(converted: nn.Module) -> ExportedProgram:
    return export(converted, (images(8),), dynamic_shapes=_dynamic_batch(), strict=True)
