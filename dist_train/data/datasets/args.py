"""Checks data.args of a dataset, and names the folder for downloaded files."""

import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dist_train.config.data import DataConfig
from dist_train.errors import ConfigError, Problem, SetupError

Args = TypeVar("Args", bound=BaseModel)


class NoArgs(BaseModel):
    """For a dataset without arguments."""

    model_config = ConfigDict(extra="forbid")


def cache_folder(data: DataConfig) -> Path:
    """Node-local folder for downloads and memory-mapped arrays: data.cache_dir, or dist_train in the user's cache.

    Raises:
        SetupError: there is no cache_dir, and the user has no home folder.
    """
    if data.cache_dir is not None:
        return data.cache_dir
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "dist_train"
    try:
        return Path.home() / ".cache" / "dist_train"
    except RuntimeError:  # no HOME, and a user id without a name, as in some containers
        raise SetupError(
            f"there is no place for the arrays of datasets: user {os.getuid()} has no home folder, and HOME is not set",
            "--data.cache_dir FOLDER, one with room on each node, or set HOME",
        ) from None


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
