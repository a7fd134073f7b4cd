"""Dimensions of inputs that vary from batch to batch, besides the batch itself."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import Any

from dist_train.errors import DataError, did_you_mean
from dist_train.trees import Tree, named_leaves

Dynamic = Mapping[str, Mapping[int, str]]
"""Their names by leaf and place, which counts the batch as 0: {"input_ids": {1: "sequence"}}."""


def plain_dynamic(given: Any) -> dict[str, dict[int, str]]:
    """Makes plain numbers and dicts of `Splits.dynamic`.

    Raises:
        DataError: it is something else.
    """
    try:
        plain = {str(leaf): {index(place): str(name) for place, name in vary.items()} for leaf, vary in given.items()}
    except (AttributeError, TypeError):
        plain = {"": {0: ""}}
    if any(place < 1 or not name for vary in plain.values() for place, name in vary.items()):
        raise DataError(
            f"Splits.dynamic is {given!r}: it names dimensions of leaves besides the batch, which is 0",
            'dynamic={"input_ids": {1: "sequence"}}; "" is the leaf of inputs that are one tensor',
        )
    return plain


def require_there(dynamic: Dynamic, example: Tree) -> None:
    """Raises DataError where `dynamic` names a leaf or a dimension that the example does not have."""
    there = {name: leaf.dim() for name, leaf in named_leaves(example)}
    for name, vary in dynamic.items():
        if name not in there:
            known = ", ".join(repr(each) for each in there)
            message = f"Splits.dynamic names the leaf {name!r}, and the inputs have {known}"
            raise DataError(message, did_you_mean(name, there) or "leave it out, or correct the name")
        for place in vary:
            if place >= there[name]:
                leaf = f"inputs.{name}" if name else "the inputs"
                message = f"Splits.dynamic names the dimension {place} of {leaf}, which have {there[name]}"
                raise DataError(message, "count the batch as 0")
