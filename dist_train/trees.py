"""Trees of tensors: what a dataset gives, what a model takes and returns.

A tree is a tensor, or a dict, tuple or list of trees (`torch.utils._pytree`). Rows are the leading dimension of every
leaf. A model takes a dict by keywords, `model(**inputs)`, a tuple or list by position, and anything else as one
argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Tree = Any
"""A tensor, or a dict, tuple or list of trees."""


def arguments(inputs: Tree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with which a model takes `inputs`, as torch.export wants them."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def call(model: Callable[..., Any], inputs: Tree) -> Any:
    """Runs a model on a tree of inputs."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def named_leaves(tree: Tree, name: str = "") -> list[tuple[str, Any]]:
    """Leaves with their places in order: ("inputs.mask", tensor) for `name` "inputs", keys as they are, numbers from 0.

    What is no dict, tuple or list is a leaf, whatever its type. A tree that is one leaf has the name `name`.
    """
    if isinstance(tree, Mapping):
        parts = list(tree.items())
    elif isinstance(tree, (tuple, list)):
        parts = list(enumerate(tree))
    else:
        return [(name, tree)]
    return [leaf for key, part in parts for leaf in named_leaves(part, f"{name}.{key}" if name else str(key))]


def leaves(tree: Tree) -> list[Any]:
    """Leaves of a tree, in order."""
    return [tree] if isinstance(tree, Tensor) else [leaf for _, leaf in named_leaves(tree)]


def map_leaves(change: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Tree of the same structure of `change(leaf, ...)`; `others` are of that structure, too."""
    return change(tree, *others) if isinstance(tree, Tensor) else tree_map(change, tree, *others)


def rebuild(tree: Tree, parts: Iterable[Any]) -> Tree:
    """Tree of the same structure whose leaves are `parts`, in order."""
    if isinstance(tree, Tensor):
        return next(iter(parts))
    following = iter(parts)
    return tree_map(lambda _: next(following), tree)


def first_leaf(tree: Tree) -> Tensor:
    """First leaf of a tree: its rows, device and dtype stand for the tree's."""
    while not isinstance(tree, Tensor):
        tree = next(iter(tree.values() if isinstance(tree, Mapping) else tree))
    return tree


def rows_of(tree: Tree) -> int:
    """Rows of a batch: the leading dimension of its first leaf."""
    return len(first_leaf(tree))


def take(tree: Tree, rows: slice | Tensor | list[int]) -> Tree:
    """Rows of every leaf of a batch, by a slice (views) or by indices (copies)."""
    return map_leaves(lambda leaf: leaf[rows], tree)


def structure_of(tree: Tree) -> Any:
    """Describes a tree in JSON: "tensor", "dict" or "tuple" of tensors; where trees lie in it, their structures.

    With the names of the leaves it tells the tree: {"ids": "tensor", "pair": "tuple"} has ids, pair.0 and pair.1.
    """
    if isinstance(tree, Mapping):
        inside: Any = {str(key): structure_of(part) for key, part in tree.items()}
        return "dict" if all(each == "tensor" for each in inside.values()) else inside
    if isinstance(tree, (tuple, list)):
        inside = [structure_of(part) for part in tree]
        return "tuple" if all(each == "tensor" for each in inside) else inside
    return "tensor"


def shapes_of(tree: Tree) -> tuple[Any, ...]:
    """Returns the shapes of a tree's leaves, hashable; the order of a dict's keys does not count."""
    if isinstance(tree, Tensor):
        return (tuple(tree.shape),)
    return tuple(sorted((name, tuple(leaf.shape)) for name, leaf in named_leaves(tree)))


def is_image(leaf: Tensor) -> bool:
    """True for a batch of images or feature maps: floats or uint8 [B, C, H, W]."""
    return leaf.dim() == 4 and (leaf.is_floating_point() or leaf.dtype == torch.uint8)


def plain(outputs: Any) -> Tree:
    """Outputs of a model as a plain tree: without None, with dicts for dataclasses and a library's own mappings.

    A Hugging Face ModelOutput becomes a dict. Numbers and what else is no tensor stay as leaves.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return {key: plain(part) for key, part in outputs.items() if part is not None}
    if is_dataclass(outputs) and not isinstance(outputs, type):
        parts = {each.name: getattr(outputs, each.name) for each in fields(outputs)}
        return {key: plain(part) for key, part in parts.items() if part is not None}
    if isinstance(outputs, (tuple, list)):
        named = getattr(outputs, "_asdict", None)
        return plain(named()) if named is not None else tuple(plain(part) for part in outputs if part is not None)
    return outputs
