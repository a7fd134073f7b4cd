"""The schema of manifest.json: an artifact's fields, checked before any of its files is opened."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MOST_VALUES = 200_000
"""The most values of a manifest; classes are most of them."""
_MOST_INPUTS = 2**27  # numbers of one input: 512 MB

# A name within the artifact's folder: no separator, no NUL, not the folder itself.
PlainName = Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f\x7f]+$", max_length=255)]
_Size = Annotated[int, Field(ge=0, lt=2**63)]
_Edge = Annotated[int, Field(gt=0, le=_MOST_INPUTS)]


class _Part(BaseModel):
    """Fields that are not listed may be any JSON: later versions add some."""

    model_config = ConfigDict(extra="allow", strict=True)


class _File(_Part):
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: _Size


class _Format(_Part):
    files: Annotated[list[PlainName], Field(min_length=1)]


class _Model(_Part):
    file: PlainName
    kind: Literal["pt2", "torchscript"]
    extra: list[PlainName] = []
    formats: dict[str, _Format] = {}

    def names(self) -> Iterable[str]:
        yield self.file
        yield from self.extra
        for each in self.formats.values():
            yield from each.files


class _Input(_Part):
    shape: Annotated[list[_Edge | None], Field(min_length=1, max_length=8)]
    dtype: Literal["float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool"]
    resize: Annotated[int, Field(gt=0, le=8192)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> _Input:
        if self.shape[0] is not None:
            raise ValueError("the first size, the batch, is null")
        if math.prod(size for size in self.shape if size is not None) > _MOST_INPUTS:
            raise ValueError(f"an input has more than {_MOST_INPUTS:,} numbers")
        return self


class _Leaf(_Input):
    name: str


class _Normalization(_Part):
    mean: list[float]
    std: list[float]


class Manifest(_Part):
    """The fields that a reader relies on; see `store.write_artifact`."""

    models: Annotated[dict[str, _Model], Field(min_length=1)]
    default: str
    task: str
    input: _Input | None = None
    inputs: list[_Leaf] = []
    outputs: list[str] = [""]
    normalization: _Normalization | None
    classes: list[str]
    ranges_sha256: str | None
    world_sizes: list[_Size]
    metrics: dict[str, Any]
    files: Annotated[dict[PlainName, _File], Field(min_length=1)]

    @model_validator(mode="after")
    def _agree(self) -> Manifest:
        if self.default not in self.models:
            raise ValueError(f"the default, {self.default!r}, is none of the models")
        for name, model in self.models.items():
            lost = next((file for file in model.names() if file not in self.files), None)
            if lost is not None:
                raise ValueError(f"the file {lost!r} of {name!r} is not listed in files")
        if {".", ".."} & set(self.files):
            raise ValueError("a folder is listed in files")
        if self.input is None and not self.inputs:
            raise ValueError("neither input nor inputs is there")
        # A dataset of finished float tensors has none, or any: nothing applies them.
        if self.input is not None and self.input.dtype == "uint8":
            channels = self.input.shape[1] if len(self.input.shape) == 4 else None
            if self.normalization is None or len(self.normalization.mean) != channels:
                raise ValueError("uint8 input without a mean and a std for each channel of images")
        if self.normalization is not None and len(self.normalization.mean) != len(self.normalization.std):
            raise ValueError("normalization does not have as many means as stds")
        return self


def mistake_in(manifest: Any) -> str:
    """Returns the first mistake in a manifest, with its place; "" where it has none."""
    try:
        Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = str(first["msg"]).removeprefix("Value error, ")
        return f"{place}: {reason}" if place else reason
    return ""
