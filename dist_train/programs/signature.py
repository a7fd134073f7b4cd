"""Signatures of models: names, shapes and dtypes of the leaves that they take, and the names of those they return."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_unflatten

from dist_train import trees
from dist_train.errors import ModelError
from dist_train.trees import Tree

Dynamic = Mapping[str, Mapping[int, str]]
"""Dimensions that vary besides the batch: their names, by leaf and dimension, as {"input_ids": {1: "sequence"}}."""


@dataclass(frozen=True)
class Leaf:
    """An input of a model.

    Attributes:
        name: its place in the tree, as `trees.named_leaves` names it; "" for the only tensor.
        shape: None for each size that varies.
        dtype: as "int64".
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    def as_json(self) -> dict[str, Any]:
        """Returns the fields for the manifest."""
        return asdict(self) | {"shape": list(self.shape)}


def leaves_of(example: Tree, dynamic: Dynamic | None = None) -> list[Leaf]:
    """Describes the leaves of an example [B, ...], in order."""
    return [
        Leaf(
            name,
            tuple(
                None if not place or place in (dynamic or {}).get(name, {}) else size
                for place, size in enumerate(leaf.shape)
            ),
            str(leaf.dtype).removeprefix("torch."),
        )
        for name, leaf in trees.named_leaves(example)
    ]


def dynamic_of(described: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """Reads the varying dimensions from a data's description, as `describe_data` makes it."""
    return {
        leaf: {int(place): name for place, name in places.items()}
        for leaf, places in described.get("dynamic", {}).items()
    }


def rows(example: Tree, count: int) -> Tree:
    """Returns the first `count` rows of an example as contiguous copies on the CPU, over again where it has fewer."""
    places = torch.arange(count) % trees.rows_of(example)
    return trees.map_leaves(lambda leaf: leaf.detach().cpu()[places].contiguous(), example)


def rows_to_trace(example: Tree, dynamic: Dynamic | None = None) -> Tree:
    """Returns rows for torch.export: several, as it makes a batch of one a constant, and not as many as a varying size.

    Equal sizes of an example could be taken for one.
    """
    named = dict(trees.named_leaves(example))
    sizes = {named[name].shape[place] for name, places in (dynamic or {}).items() for place in places}
    return rows(example, next(count for count in (2, 3, 5, 7, *range(8, 99)) if count not in sizes))


def dynamic_shapes(model: nn.Module, example: Tree, dynamic: Dynamic | None = None) -> Any:
    """Returns torch.export's `dynamic_shapes` for a model that takes `example`: the batch, and what varies besides.

    torch.export finds the bounds of the other dimensions by itself, such as the number of position embeddings.
    """
    batch, dynamic = Dim("batch", min=1), dynamic or {}
    if isinstance(example, Tensor):
        shape = {0: batch} | dict.fromkeys(dynamic.get("", {}), Dim.DYNAMIC)
        return tuple(inspect.signature(model.forward).bind(shape).arguments.values())
    named = [
        (name, {0: batch} | dict.fromkeys(dynamic.get(name, {}), Dim.DYNAMIC))
        for name, _ in trees.named_leaves(example)
    ]
    shapes = dict(named)
    args, kwargs = trees.arguments(_map_named(lambda name, leaf: shapes[name], example))
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def _map_named(change: Callable[[str, Any], Any], tree: Tree, name: str = "") -> Tree:
    """Returns the tree of `change(name, leaf)`."""
    if isinstance(tree, Mapping):
        return {key: _map_named(change, part, f"{name}.{key}" if name else str(key)) for key, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [_map_named(change, part, f"{name}.{key}" if name else str(key)) for key, part in enumerate(tree)]
        return type(tree)(parts)
    return change(name, tree)


def tree_of(names: Sequence[str], leaves: Sequence[Any]) -> Tree:
    """Returns the plain tree whose leaves have these names: the reverse of `trees.named_leaves`.

    Numbers from 0 make a tuple, other names a dict, and "" alone is the leaf itself.
    """
    if list(names) == [""]:
        return leaves[0]
    parts: dict[str, list[tuple[str, Any]]] = {}
    for name, leaf in zip(names, leaves, strict=True):
        first, _, rest = name.partition(".")
        parts.setdefault(first, []).append((rest, leaf))
    built = {key: tree_of(*zip(*each, strict=True)) for key, each in parts.items()}
    places = [str(place) for place in range(len(built))]
    return tuple(built[place] for place in places) if built.keys() == set(places) else built


def runtime_names(names: Sequence[str], alone: str) -> list[str]:
    """Returns the names of leaves in formats of other runtimes: `alone` for the only tensor, "a_0" for "a.0"."""
    if list(names) == [""]:
        return [alone]
    found = [name.replace(".", "_") for name in names]
    return found if len(set(found)) == len(found) else list(names)


def output_names(model: nn.Module | ExportedProgram, example: Tree) -> list[str]:
    """Returns the names of a model's outputs, in order: [""] for one tensor.

    Args:
        model: in evaluation mode. A module runs on two rows of `example`.
    """
    if isinstance(model, ExportedProgram):
        spec = model.call_spec.out_spec
        assert spec is not None
        outputs = tree_unflatten(list(range(spec.num_leaves)), spec)
    else:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = trees.call(model, rows(example, 2))
    return [name for name, _ in trees.named_leaves(trees.plain(outputs))]


def plain_outputs(model: nn.Module, outputs: Any) -> nn.Module:
    """Returns a model whose forward gives `trees.plain` of the outputs: a program holds no other package's classes.

    The result shares everything else with `model`, and is `model` itself where its outputs are plain.

    Args:
        outputs: of the model, for any inputs.

    Raises:
        ModelError: an output is no tensor.
    """
    for name, leaf in trees.named_leaves(trees.plain(outputs), "outputs"):
        if not isinstance(leaf, Tensor):
            raise ModelError(
                f"{name} of the model is a {type(leaf).__name__}: a program returns tensors only",
                "return tensors, or None where there is nothing",
            )
    if _is_plain(outputs):
        return model
    kind, choose = type(model), _chooser(outputs)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return choose(kind.forward(self, *args, **kwargs))

    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    changed = copy.copy(model)
    changed.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return changed


def _is_plain(outputs: Any) -> bool:
    if type(outputs) in (dict, tuple):
        return all(map(_is_plain, outputs.values() if isinstance(outputs, dict) else outputs))
    return isinstance(outputs, Tensor)


def _chooser(outputs: Any) -> Callable[[Any], Tree]:
    """Returns a function that gives the plain tree of outputs like these, by steps that torch.export can trace."""
    if isinstance(outputs, Tensor):
        return lambda value: value
    if isinstance(outputs, Mapping):
        items = {key: _chooser(part) for key, part in outputs.items() if part is not None}
        return lambda value: {key: choose(value[key]) for key, choose in items.items()}
    if hasattr(outputs, "_asdict") or not isinstance(outputs, (tuple, list)):
        named = {key: getattr(outputs, key) for key in trees.plain(outputs)}
        fields = {key: _chooser(part) for key, part in named.items()}
        return lambda value: {key: choose(getattr(value, key)) for key, choose in fields.items()}
    parts = [(place, _chooser(part)) for place, part in enumerate(outputs) if part is not None]
    return lambda value: tuple(choose(value[place]) for place, choose in parts)
