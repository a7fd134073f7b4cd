"""Search for torchao's patterns of layers along the edges of a graph, instead of through the product of all layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.passes.utils.source_matcher_utils import SourcePartition, get_source_partitions

from dist_train.quantization.pt2e.torchao_parts import graph_utils, x86_inductor_quantizer

_Chain = tuple[SourcePartition, ...]


@contextmanager
def searched_along_edges() -> Iterator[None]:
    """Makes X86InductorQuantizer search by `find_sequential_partitions` of this module inside the block."""
    original = x86_inductor_quantizer.find_sequential_partitions
    x86_inductor_quantizer.find_sequential_partitions = find_sequential_partitions
    try:
        yield
    finally:
        x86_inductor_quantizer.find_sequential_partitions = original


def find_sequential_partitions(
    module: GraphModule,
    partition_types: list[Any],
    include_functional_equivalent: bool = True,
    filter_fn: Callable[[Node], bool] | None = None,
) -> list[_Chain]:
    """Finds chains of partitions, each of which reads a node of the one before; as torchao's function of this name.

    The chains and their order are the same: that of the product of the lists of partitions. torchao tries all tuples of
    that product, 4e8 of them for a mobileone_s0.
    """
    kinds = [
        list(
            chain.from_iterable(
                get_source_partitions(module.graph, graph_utils._get_matching_types(kind), filter_fn).values()
            )
        )
        for kind in partition_types
    ]
    chains: list[_Chain] = [(first,) for first in kinds[0]]
    for partitions in kinds[1:]:
        readers: dict[Node, set[int]] = defaultdict(set)
        for index, partition in enumerate(partitions):
            for node in partition.input_nodes:
                readers[node].add(index)
        chains = [
            (*before, partitions[index])
            for before in chains
            for index in sorted(set[int]().union(*(readers.get(node, ()) for node in before[-1].nodes)))
        ]
    return chains
