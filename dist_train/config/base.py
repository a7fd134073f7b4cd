"""The base of all sections of the configuration: immutable settings, and names that must be registered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from dist_train import registry

# Marks a field that does not determine the result: a run may be resumed with another value.
MAY_CHANGE_ON_RESUME: dict[str, Any] = {"determines_result": False}
Momentum = Annotated[float, Field(ge=0.0, lt=1.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
# Numbers beyond these bounds are slips of the keyboard, and overflow in clocks, samplers or torch.
Count = Annotated[int, Field(gt=0, lt=2**31)]
Rate = Annotated[float, Field(gt=0, le=1e6)]  # a learning rate, or a number of its size; float32 holds its products
Seconds = Annotated[float, Field(gt=0, le=1e9)]
Address = Annotated[str, Field(pattern=r"^[a-zA-Z][a-zA-Z0-9+.-]+://")]  # as `addresses.is_address`
Pixels = Annotated[int, Field(ge=1, le=65_536)]  # of an image's edge


class Settings(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


@dataclass(frozen=True)
class Registered:
    """Annotation of a string that must be a registered name, or one of `also`; editors complete the names.

    Attributes:
        refused: names that someone may expect, with the reason against each and what to type.
    """

    names: registry.Registry
    also: tuple[str, ...] = ()
    refused: Mapping[str, tuple[str, str]] = field(default_factory=dict, hash=False)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "examples": [*self.also, *self.names.names()]}

    def _check(self, name: str) -> str:
        if name in self.names or name in self.also:
            return name
        if name in self.refused:
            reason, hint = self.refused[name]
            raise PydanticCustomError("refused_name", "{reason}", {"reason": f"{name!r} {reason}", "hint": hint})
        found = {"kind": self.names.kind, "name": name, "suggestion": self.names.suggestion(name, self.also)}
        raise PydanticCustomError("unknown_name", "unknown {kind} '{name}'; {suggestion}", found)
