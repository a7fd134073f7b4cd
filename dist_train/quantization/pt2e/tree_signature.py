"""Signature of an exported graph whose inputs or outputs are a tree: the graph itself takes and returns leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils._pytree import TreeSpec, tree_unflatten

from dist_train import trees
from dist_train.programs.signature import tree_of
from dist_train.trees import Tree

_Path = tuple[Any, ...]


@dataclass(frozen=True)
class TreeSignature:
    """Inputs and outputs of a graph.

    Attributes:
        paths: the place of each of the graph's inputs in the arguments: keys and positions, from outside to inside.
        outputs: plain tree of the places of the graph's outputs.
        codegen: the code around the graph by which a GraphModule takes and returns trees.
    """

    paths: tuple[_Path, ...]
    outputs: Tree
    codegen: CodeGen

    @classmethod
    def of(cls, module: GraphModule) -> TreeSignature | None:
        """Reads the signature of an exported module; None for one tensor in and one tensor out."""
        taken, returned = module._in_spec, module._out_spec
        assert isinstance(taken, TreeSpec) and isinstance(returned, TreeSpec)
        args, kwargs = tree_unflatten(list(range(taken.num_leaves)), taken)
        if returned.is_leaf() and len(args) == 1 and args == (0,) and not kwargs:
            return None
        assert not (args and kwargs), "a tree of inputs is a dict or a tuple"
        places = {place: path for path, place in _paths(kwargs or args)}
        named = trees.named_leaves(trees.plain(tree_unflatten(list(range(returned.num_leaves)), returned)))
        outputs = tree_of(*zip(*named, strict=True))
        return cls(tuple(places[place] for place in range(len(places))), outputs, module.graph._codegen)

    def leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Returns the graph's inputs from the arguments of the model's forward."""
        return [_at(kwargs or args, path) for path in self.paths]

    def tree(self, values: Sequence[Any]) -> Tree:
        """Returns the model's outputs from those of the graph."""
        return _filled(self.outputs, values)


def _paths(tree: Any, path: _Path = ()) -> list[tuple[_Path, int]]:
    """Returns the path of each leaf, and the leaf."""
    if isinstance(tree, Mapping):
        return [each for key, part in tree.items() for each in _paths(part, (*path, key))]
    if isinstance(tree, (tuple, list)):
        return [each for key, part in enumerate(tree) for each in _paths(part, (*path, key))]
    return [(path, tree)]


def _at(tree: Any, path: _Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _filled(places: Tree, values: Sequence[Any]) -> Tree:
    if isinstance(places, dict):
        return {key: _filled(part, values) for key, part in places.items()}
    if isinstance(places, tuple):
        return tuple([_filled(part, values) for part in places])
    return values[places]
