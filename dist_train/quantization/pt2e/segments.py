"""Code of a graph in pieces, of which those of chosen layers are computed anew in backward.

A graph is in the order of its execution. The nodes between the first and the last of a layer so make a piece with
inputs and outputs, whatever else stands between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from dist_train.models.recomputation import recomputed
from dist_train.quantization.fx_nodes import module_of

_Piece = tuple[str, list[Node]]


@dataclass(frozen=True)
class _Segment:
    """A piece of code.

    Attributes:
        name: of the layers that backward computes anew; "" for none.
        inputs, outputs: indices of values.
        dropped: values that nothing reads after this piece.
        owners: names of modules with buffers that it may change.
    """

    name: str
    code: Callable[..., tuple[Any, ...]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dropped: tuple[int, ...]
    owners: tuple[str, ...]


def code_in_segments(root: nn.Module, graph: Graph, names: Sequence[str]) -> Callable[..., Any]:
    """Returns the function of a graph: called with the module that holds the tensors, and with the graph's inputs.

    Args:
        root: has the tensors of the graph; only their names count.
        names: layers whose activations are not kept, by the names in the nodes' module stacks.
    """
    pieces = _pieces(graph, names)
    last_read = dict.fromkeys(graph.output_node().all_input_nodes, len(pieces))
    for number, (_, nodes) in enumerate(pieces):
        for node in nodes:
            for read in node.all_input_nodes:
                last_read[read] = max(last_read.get(read, 0), number)
    index = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    segments = list[_Segment]()
    for number, (name, nodes) in enumerate(pieces):
        own = set(nodes)
        reads = dict.fromkeys(read for node in nodes for read in node.all_input_nodes)
        inputs = [read for read in reads if read not in own and read.op != "get_attr"]
        outputs = [node for node in nodes if last_read.get(node, -1) > number]
        for node in outputs:
            index[node] = len(index)
        dropped = [read for read in inputs if last_read[read] == number]
        segments.append(
            _Segment(
                name,
                _code(root, nodes, inputs, outputs),
                inputs=tuple(index[each] for each in inputs),
                outputs=tuple(index[each] for each in outputs),
                dropped=tuple(index[each] for each in dropped),
                owners=_owners(nodes),
            )
        )
    result = graph.output_node().args[0]

    def run(module: nn.Module, *inputs: Any) -> Any:
        values: dict[int, Any] = dict(enumerate(inputs))
        for segment in segments:
            given = [values[each] for each in segment.inputs]
            if segment.name:
                owners = [module.get_submodule(owner) for owner in segment.owners]
                made = recomputed(segment.name, owners, segment.code, module, *given)
            else:
                made = segment.code(module, *given)
            values.update(zip(segment.outputs, made, strict=True))
            for each in segment.dropped:
                del values[each]
        return map_arg(result, lambda node: values[index[node]])

    return run


def _pieces(graph: Graph, names: Sequence[str]) -> list[_Piece]:
    """Cuts the nodes, without inputs, outputs and tensors, into pieces; layers that overlap are one."""
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    spans = list[tuple[int, int, str]]()
    for name in names:
        own = [i for i, node in enumerate(nodes) if f"{module_of(node)}.".startswith(f"{name}.")]
        if own:
            spans.append((own[0], own[-1] + 1, name))
    pieces, done = list[_Piece](), 0
    for first, last, name in sorted(spans):
        if first < done and pieces:  # overlaps with the one before
            before, taken = pieces.pop()
            pieces.append((f"{before} and {name}", taken + nodes[done:last]))
        else:
            pieces += [("", nodes[done:first]), (name, nodes[first:last])]
        done = max(done, last)
    pieces.append(("", nodes[done:]))
    return [piece for piece in pieces if piece[1]]


def _code(
    root: nn.Module, nodes: list[Node], inputs: list[Node], outputs: list[Node]
) -> Callable[..., tuple[Any, ...]]:
    piece, made = Graph(), dict[Node, Node]()
    for node in inputs:
        made[node] = piece.placeholder(node.name)

    def copied(node: Node) -> Node:
        if node not in made:  # a tensor of the model
            made[node] = piece.node_copy(node)
        return made[node]

    for node in nodes:
        made[node] = piece.node_copy(node, copied)
    piece.output(tuple(made[node] for node in outputs))
    return type(GraphModule(root, piece)).forward


def _owners(nodes: list[Node]) -> tuple[str, ...]:
    """Returns the modules whose tensors the nodes read, and the modules that they call."""
    found = dict[str, None]()
    for node in nodes:
        if node.op == "call_module":
            found[str(node.target)] = None
        for read in node.all_input_nodes:
            if read.op == "get_attr":
                found[str(read.target).rpartition(".")[0]] = None
    return tuple(found)
