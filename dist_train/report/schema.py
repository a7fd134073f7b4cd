"""The schemas of a run's files, as far as a report relies on them; a file that was damaged is named with the place."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dist_train.errors import RunDirError

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True, gt=-(2**63), lt=2**63)]


class _Part(BaseModel):
    """Other fields may be any JSON."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Named(_Part):
    name: str | None = None


class ConfigFile(_Part):
    run: _Named | None = None
    data: _Named | None = None
    model: _Named | None = None


class Status(_Part):
    state: str = "unknown"
    stage: str | None = None
    step: Whole | None = None
    error: str | None = None


class Environment(_Part):
    world_size: Whole | None = None


class _Weights(_Part):
    share: Number
    float_modules: dict[str, Any]


class _Figures(_Part):
    bytes: Annotated[Whole, Field(gt=0)] | None = None
    latency_ms: dict[str, Number] = {}
    runtime: str = ""
    weights: _Weights | None = None


class _Gate(_Part):
    value: Number | None = None
    bound: Number
    runtime: str = ""


class _Stage(_Part):
    steps: Whole | None = None
    seconds: Number | None = None


class Results(_Part):
    run: str = ""
    world_size: Whole = 1
    models: dict[str, _Figures] = {}
    gates: dict[str, _Gate] = {}
    gates_skipped: dict[str, str] = {}
    stages: dict[str, _Stage] = {}
    layer_sqnr_db: dict[str, Number | str] = {}


class _Sample(_Part):
    id: Any
    loss: Number
    target: Any
    decision: Any
    image: str | None


class _Metrics(_Part):
    confusion: list[list[Number]] | None = None
    confused_pairs: list[tuple[Whole, Whole, Number, Number]] | None = None
    num_samples: Number = 0
    num_wrong: Number = 0
    num_pairs: Whole = 0


class Details(_Part):
    classes: list[str]
    metrics: _Metrics
    worst: list[_Sample]

    @model_validator(mode="after")
    def _classes_are_there(self) -> Details:
        for target, decision, _, total in self.metrics.confused_pairs or ():
            if not (0 <= target < len(self.classes) and 0 <= decision < len(self.classes) and total > 0):
                raise ValueError("metrics.confused_pairs names a class that is not there, or one without samples")
        return self


class Line(_Part):
    """A line of metrics.jsonl, whose other fields are scalars."""

    stage: str
    epoch: Whole
    step: Whole
    attempt: Whole


File = TypeVar("File", bound=BaseModel)


def checked(value: Any, model: type[File], where: object) -> Any:
    """Returns a value that was read from `where`, if the schema takes it.

    Raises:
        RunDirError: it does not; names the first mistake.
    """
    try:
        # Through JSON, where a list may be a tuple.
        model.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = str(first["msg"]).removeprefix("Value error, ")
        raise RunDirError(
            f"{where} is damaged: {place + ': ' if place else ''}{reason}",
            "restore it, or remove it: the report is written without it",
        ) from error
    return value
