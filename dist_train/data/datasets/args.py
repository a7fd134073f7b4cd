"""Checks data.args of a dataset, and names the folder for downloaded files."""

import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dist_train.config.data import DataConfig
from dist_train.errors import ConfigError, Problem

Args = TypeVar("Args", bound=BaseModel)


class NoArgs(BaseModel):
    """For a dataset without arguments."""

    model_config = ConfigDict(extra="forbid")


def cache_folder(data: DataConfig) -> Path:
    """Node-local folder for downloads and memory-mapped arrays: data.cache_dir, or dist_train in the user's cache."""
    if data.cache_dir is not None:
        return data.cache_dir
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_train"


def read_args(data: DataConfig, model: type[Args]) -> Args:
    """Parses data.args; raises ConfigError with each mistake."""
    try:
        return model.model_validate(data.args)
    except ValidationError as error:
        known = ", ".join(model.model_fields) or "none"
        problems = [
            Problem(
                ".".join(["data", "args", *map(str, mistake["loc"])]),
                mistake["msg"],
                hint=f"known arguments of {data.name}: {known}",
            )
            for mistake in error.errors()
        ]
        raise ConfigError(problems) from error
