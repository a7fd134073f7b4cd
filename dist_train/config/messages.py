"""Turns pydantic's errors into plain messages, each with the nearest valid name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel

from dist_train.config.yaml_tree import Place, Tree, dotted
from dist_train.errors import Problem, ask_for, did_you_mean, likeness, nearest

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a section of settings (key: value)",
    "model": "a section of settings (key: value)",
}
_WITH_NEAREST = 20  # unknown keys that get the nearest known one, whose search takes milliseconds
_MUCH_NEARER = 0.2  # in likeness: a key of another section is then meant rather than one of this
_COMPARISONS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


class Mistake(NamedTuple):
    """A Problem, its place in the tree, and the place to cut from the tree to remove it.

    `known_key` is True where the cut sets a known setting to its default.
    """

    place: Place
    cut: Place
    problem: Problem
    known_key: bool


def mistakes(errors: list[Any], model: type[BaseModel], tree: Tree) -> Iterator[Mistake]:
    """Yields each mistake of `ValidationError.errors()`; mistakes of a union's members at one place become one."""
    by_place: dict[Place, list[tuple[Place, Any]]] = {}
    for error in errors:
        present = _present(error["loc"], tree.values)
        missing = (*present, error["loc"][-1]) if error["type"] == "missing" else present
        by_place.setdefault(missing, []).append((present, error))
    unknown = 0
    for place, found in by_place.items():
        wordings = [_wording(error) for _, error in found]
        message = _either(list(dict.fromkeys(message for message, _ in wordings)))
        hint = next((hint for _, hint in wordings if hint), "")
        error = found[0][1]
        if error["type"] == "extra_forbidden":
            unknown += 1
            hint = nearest_key(place, model) if unknown <= _WITH_NEAREST else ""
        if error["type"] == "union_tag_not_found":
            tag = (*place, error["ctx"]["discriminator"].strip("'"))
            names = [name for key, type_ in _keys(model) if _numbered(key, place) == tag for name in get_args(type_)]
            hint = f"add {tag[-1]}: one of {', '.join(map(str, names))}"
        if error["type"] == "union_tag_invalid":
            place = (*place, error["ctx"]["discriminator"].strip("'"))
        problem = Problem(dotted(place), message, tree.source_of(place), hint)
        yield Mistake(place, found[0][0], problem, error["type"] != "extra_forbidden")


def shown(value: Any) -> str:
    """Returns a value as a person wrote it, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return ("a section" if isinstance(value, dict) else "a list") + (" without items" if not value else "")
    text = f"the text {value!r}" if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest_key(place: Place, model: type[BaseModel]) -> str:
    """Returns the hint for an unknown key: similar keys beside it, or keys of that name in other sections."""
    section, last = place[:-1], str(place[-1])
    keys = [_numbered(key, place) for key, _ in _keys(model)]
    if section and (last,) in keys:  # find_unused_parameters, compile: of the whole run, not of a stage
        return ask_for([last])
    beside = [str(key[-1]) for key in keys if key[:-1] == section and key != place]
    alike, known = nearest(last, beside), sorted({str(key[-1]) for key in keys})
    best = max((likeness(last, name) for name in known), default=0.0)
    if alike and best - likeness(last, alike[0]) < _MUCH_NEARER:
        return ask_for([dotted((*section, key)) for key in alike])
    elsewhere = [key for key in keys if key[:-1] != section and key[-1] == last]
    if not elsewhere:
        close = nearest(last, known, count=1)
        elsewhere = [key for key in keys if key[-1] in close]
    if elsewhere:
        inside = [key for key in elsewhere if key[: len(section)] == section] or elsewhere
        # A list's item is hardly meant where a setting has that name.
        plain = [key for key in inside if not any(isinstance(part, int) for part in key)]
        return ask_for([dotted(key) for key in (plain or inside)[:3]])
    return f"known here: {', '.join(beside)}" if beside else ""


def _present(loc: tuple[str | int, ...], values: Any) -> Place:
    """Returns the part of pydantic's location that exists in the tree: without the names of a union's members."""
    place: Place = ()
    for key in loc:
        inside = isinstance(values, dict) and key in values
        if inside or (isinstance(values, list) and isinstance(key, int) and key < len(values)):
            values, place = values[key], (*place, key)
    return place


def _either(messages: list[str]) -> str:
    """Joins messages: ["must be A, not X", "must be B, not X"] -> "must be A or B, not X"."""
    pairs = [message.removeprefix("must be ").rpartition(", not ") for message in messages]
    if len(pairs) > 1 and all(
        message.startswith("must be ") and pair[1] for message, pair in zip(messages, pairs, strict=True)
    ):
        return "must be " + " or ".join(pair[0] for pair in pairs) + ", not " + pairs[0][2]
    return "; or ".join(messages)


def _wording(error: Mapping[str, Any]) -> tuple[str, str]:
    """Returns (message, hint) of one mistake."""
    kind, context, given = error["type"], error.get("ctx", {}), shown(error["input"])
    if kind == "unknown_name":
        return f"unknown {context['kind'].replace('_', ' ')} {context['name']!r}", context["suggestion"]
    if kind == "refused_name":
        return context["reason"], context["hint"]
    if kind == "extra_forbidden":
        return "unknown key", ""
    if kind == "missing":
        return "is missing", ""
    if kind == "union_tag_invalid":
        return f"unknown name {context['tag']!r}", _choose(context["tag"], context["expected_tags"])
    if kind == "union_tag_not_found":
        return f"lacks its {context['discriminator'].strip(chr(39))}", ""
    if kind == "literal_error":
        return f"must be {context['expected'].replace('True', 'true')}, not {given}", _choose(
            error["input"], context["expected"]
        )
    if kind in _COMPARISONS:
        bound, words = _COMPARISONS[kind]
        return f"must be {words} {context[bound]:.15g}, not {given}", ""
    if kind == "finite_number":
        return f"must be a finite number, not {given}", ""
    if kind == "string_pattern_mismatch":
        return f"{given} does not match the pattern {context['pattern']}", ""
    if kind in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        words = "at least" if kind == "too_short" else "at most"
        return f"must have {words} {bound} item{'' if bound == 1 else 's'}, not {context['actual_length']}", ""
    expected = _EXPECTED.get(kind.rpartition("_")[0])
    if expected:
        structured = kind == "string_type" and isinstance(error["input"], dict | list)
        return (
            f"must be {expected}, not {given}",
            """quote a text that looks like YAML: '"a: {b}"'""" if structured else "",
        )
    return str(error["msg"])[:1].lower() + str(error["msg"])[1:], ""


def _choose(given: Any, expected: str) -> str:
    names = re.findall(r"'([^']*)'", expected)
    guess = did_you_mean(given, names, count=1) if isinstance(given, str) else ""
    return guess or ("one of: " + ", ".join(names) if len(names) > 1 else "")


def _keys(model: type[BaseModel], section: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yields every key that the model knows, with its type; -1 stands for the number of a list's item."""
    for name, info in model.model_fields.items():
        yield (*section, name), info.annotation
        several = get_origin(info.annotation) in (list, tuple, dict)
        for inner in _models_in(info.annotation):
            yield from _keys(inner, (*section, name, -1) if several else (*section, name))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _numbered(key: Place, like: Place) -> Place:
    return tuple(like[i] if part == -1 and i < len(like) else 0 if part == -1 else part for i, part in enumerate(key))
