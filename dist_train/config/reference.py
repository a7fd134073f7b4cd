"""Writes every setting as Markdown tables, from the models that check a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dist_train import registry
from dist_train.config.fit import FitConfig
from dist_train.config.stages import TrainConfig
from dist_train.config.tree import config_model
from dist_train.config.yaml_text import to_yaml

_HEAD = "| Setting | Type | Default | On resume | Meaning |\n|---|---|---|---|---|\n"
_TYPES = {"integer": "int", "number": "float", "boolean": "true, false", "null": "null", "object": "section"}
_BOUNDS = {"minimum": "≥ {:g}", "exclusiveMinimum": "> {:g}", "maximum": "≤ {:g}", "exclusiveMaximum": "< {:g}"}
_MANY = 12  # more names than this are not listed


class _Row(NamedTuple):
    key: str
    type: str
    default: str
    resume: str
    meaning: str

    def __str__(self) -> str:
        return f"| {' | '.join(self)} |\n"


def reference() -> str:
    """Returns a table for each section, also of registered stages; `qat` leaves out the settings shared with `train`.

    A setting that determines the result is "fixed": a run is not resumed with another value.
    """
    model = config_model(registry.stages.names())
    common = set(_rows(TrainConfig))
    top, sections = [], []
    for name, info in model.model_fields.items():
        inner = _section(info)
        if inner is None:
            top += list(_field_rows(model, name, ""))
            continue
        rows = list(_rows(inner))
        intro = _cell(info.description or inner.__doc__ or "", inherited=BaseModel.__doc__)
        if issubclass(inner, FitConfig) and inner is not TrainConfig:
            rows = [row for row in rows if row not in common]
            intro = f"{intro} The settings of `train`, and these, which are new or have another default:".strip()
        if _optional(info):
            intro = f"{intro} Left out by default.".strip()
        sections.append(f"## `{name}`\n\n" + (f"{intro}\n\n" if intro else "") + _HEAD + "".join(map(str, rows)))
    return "\n".join(["## At the top\n\n" + _HEAD + "".join(map(str, top)), *sections])


def _rows(model: type[BaseModel], prefix: str = "") -> Iterator[_Row]:
    for name in model.model_fields:
        yield from _field_rows(model, name, prefix)


def _field_rows(model: type[BaseModel], name: str, prefix: str) -> Iterator[_Row]:
    """Yields the rows of a field: its own or its section's, then the rows of sections that it may hold."""
    info, key = model.model_fields[name], f"{prefix}{name}"
    inner = _section(info)
    if inner is not None and not _optional(info):
        # In this tree a section's default is always the default of its model.
        yield from _rows(inner, f"{key}.")
        return
    schema = model.model_json_schema()
    properties, definitions = schema["properties"][name], schema.get("$defs", {})
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    resume = "fixed" if extra.get("determines_result", True) else "may change"
    yield _Row(f"`{key}`", _type(properties, definitions), _default(info), resume, _cell(info.description or ""))
    held = list(dict.fromkeys(_models_in(info.annotation)))
    for each in held:
        kind = each.model_fields["name"].default if "name" in each.model_fields and len(held) > 1 else ""
        mark = f"{key}[{kind}]." if _is_list(info) else f"{key}."
        for row in _rows(each, mark):
            if resume != "fixed":  # all that is in it may change, too
                row = row._replace(resume=resume)
            if not (kind and row.key == f"`{mark}name`"):
                yield row


def _section(info: FieldInfo) -> type[BaseModel] | None:
    """Returns the model of a section, also of an optional one; None for a plain setting."""
    options = [option for option in (get_args(info.annotation) or [info.annotation]) if option is not type(None)]
    only = options[0] if len(options) == 1 else None
    return only if isinstance(only, type) and issubclass(only, BaseModel) and not _is_list(info) else None


def _is_list(info: FieldInfo) -> bool:
    return getattr(info.annotation, "__origin__", None) in (list, tuple, dict)


def _optional(info: FieldInfo) -> bool:
    return type(None) in get_args(info.annotation)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _default(info: FieldInfo) -> str:
    if info.is_required() or info.default is PydanticUndefined:
        return "required"
    value = info.default
    if isinstance(value, tuple):
        value = list(value)
    return f"`{to_yaml(value, one_line=True)}`"


def _type(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Returns type and bounds in a few words, from a field's JSON schema."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(each, definitions) for each in schema["anyOf"]))
    if "oneOf" in schema:
        kinds = [definitions[each["$ref"].rpartition("/")[2]]["properties"]["name"] for each in schema["oneOf"]]
        return ", ".join(f"`{kind['const']}`" for kind in kinds)
    if "$ref" in schema:
        return "section"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{to_yaml(value, one_line=True)}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        items: dict[str, Any] = schema.get("items") or next(iter(schema.get("prefixItems", [])), {})
        count = schema.get("minItems")
        several = f"{count} " if count is not None and count == schema.get("maxItems") else "list of "
        return several + _type(items, definitions)
    if kind == "string":
        names = schema.get("examples", [])
        listed = ", ".join(f"`{name}`" for name in names)
        return (
            "path"
            if schema.get("format") == "path"
            else listed
            if 0 < len(names) <= _MANY
            else "name"
            if names
            else "text"
        )
    bounds = [words.format(schema[bound]) for bound, words in _BOUNDS.items() if bound in schema]
    # Bounds as wide as a seed's are of no use to a reader.
    shown = " ".join(bound for bound in bounds if "e+" not in bound)
    return f"{_TYPES.get(str(kind), 'any')} {shown}".strip()


def _cell(text: str, inherited: str | None = None) -> str:
    """Returns a docstring as one line for a table's cell."""
    return "" if text == inherited else " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
