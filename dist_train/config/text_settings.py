"""Tells from the type of a setting whether its value on the command line is a text as typed, or YAML."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from dist_train.config.yaml_tree import Place, TextType


def text_type(model: type[BaseModel], place: Place) -> TextType | None:
    """Returns how an option's text for the setting at `place` is read; None: as YAML.

    Names, paths and choices among names are texts. A setting that may also be a number or a boolean is YAML, and so are
    lists, sections, free arguments (`data.args`) and unknown keys.
    """
    kinds = {_kind(member) for member in _at([model], place)}
    if "text" not in kinds or "other" in kinds:
        return None
    return TextType(optional="none" in kinds, or_collection="collection" in kinds)


def _at(annotations: list[Any], place: Place) -> list[Any]:
    """Returns the types that the value at `place` may have."""
    found = [member for annotation in annotations for member in _members(annotation)]
    for key in place:
        found = [member for outer in found for inner in _inside(outer, key) for member in _members(inner)]
    return found


def _members(annotation: Any) -> Iterator[Any]:
    """Yields the members of a union, without pydantic's annotations."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _inside(annotation: Any, key: str | int) -> Iterator[Any]:
    """Yields the type of the value at `key` in a section, list or mapping."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if key in annotation.model_fields:
            yield annotation.model_fields[str(key)].annotation
    elif origin is dict:
        yield parts[1]
    elif origin is list or (origin is tuple and Ellipsis in parts):
        yield parts[0]
    elif origin is tuple and isinstance(key, int) and key < len(parts):
        yield parts[key]


def _kind(annotation: Any) -> Literal["text", "none", "collection", "other"]:
    origin = get_origin(annotation)
    if annotation in (None, types.NoneType):
        return "none"
    if origin is Literal:
        return "text" if all(isinstance(value, str) for value in get_args(annotation)) else "other"
    of = origin or annotation
    if not isinstance(of, type):
        return "other"
    if issubclass(of, (str, PurePath)):
        return "text"
    return "collection" if issubclass(of, (BaseModel, list, tuple, dict)) else "other"
