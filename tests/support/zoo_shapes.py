"""Small networks with shapes of model zoos: blocks under modes, sums from 0, standardized weights, deep chains."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node


class Attention(nn.Module):
    """Linear attention in float32, as in EfficientViT: a block without tensors of its own.

    nested: a part without gradients is inside of that block, not before it.
    """

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(4, 5)
        self.nested = nested

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.norm(self.stem(x)).flatten(2).chunk(3, 1)
        if not self.nested:
            with torch.no_grad():
                scale = 1 / (key.relu().sum((1, 2), keepdim=True) + 1)
        with torch.autocast(device_type=x.device.type, enabled=False):
            if self.nested:
                with torch.no_grad():
                    scale = 1 / (key.relu().sum((1, 2), keepdim=True) + 1)
            mixed = (value @ key.relu().transpose(-1, -2)) * scale @ query.relu()
        return self.head(mixed.mean(-1))


class Reparameterizable(nn.Module):
    """Branches of convolution and batch norm, summed from 0 and in place, as in MobileOne and FastViT."""

    def __init__(self, branches: int = 2) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)) for _ in range(branches)
        )
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = 0
        for branch in self.branches:
            y = y + branch(x)
        scaled = 0 + 1 * self.branches[0](x)
        scaled += y
        return self.head(F.relu(scaled).mean((2, 3)))


class ZeroBesideWrites(nn.Module):
    """A sum with 0 that is a copy: what is written into it must not be written into its source."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = y + 0
        z[:, 0].mul_(0)
        z.relu_()
        return self.head((y - z).mean((2, 3)))


def by_batch_norm(weight: Tensor, gain: Tensor) -> Tensor:
    """As timm's ScaledStdConv2d, of NFNets and NF-RegNets, and StdConv2d, of BiT."""
    flat = weight.reshape(1, len(weight), -1)
    return F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6).reshape_as(weight)


def by_moments(weight: Tensor, gain: Tensor) -> Tensor:
    """As the first BiT, by var_mean."""
    variance, mean = torch.var_mean(weight, (1, 2, 3), correction=0, keepdim=True)
    return (weight - mean) / torch.sqrt(variance + 1e-6) * gain.reshape(-1, 1, 1, 1)


class Standardized(nn.Module):
    """Convolutions whose weights are standardized in each forward pass; one of them has a batch norm behind it."""

    def __init__(self, standardize: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.head = nn.Linear(8, 5)
        self.standardize = standardize

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.standardize(self.stem.weight, self.gain), self.stem.bias, 2, 1))
        y = F.conv2d(y, self.standardize(self.conv.weight, self.gain), self.conv.bias)
        return self.head(F.relu(self.norm(y)).mean((2, 3)))


def residual_chain(layers: int) -> GraphModule:
    """A graph as exported, without tensors: `layers` times a convolution, a batch norm, an addition and a ReLU."""
    graph = Graph()
    x = graph.placeholder("x")
    for index in range(layers):
        y = _call(graph, f"conv{index}", nn.Conv2d, x)
        y = _call(graph, f"norm{index}", nn.BatchNorm2d, y)
        y = _call(graph, f"add{index}", operator.add, y, x)
        x = _call(graph, f"relu{index}", nn.ReLU, y)
    graph.output(x)
    return GraphModule(nn.Module(), graph)


def _call(graph: Graph, name: str, source: object, *inputs: Node) -> Node:
    node = graph.call_function(torch.add if len(inputs) == 2 else torch.relu, inputs)
    node.meta["source_fn_stack"] = [(name, source)]
    return node
