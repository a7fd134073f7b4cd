"""Reads what a run was started with. Each checkpoint holds a copy, for where config.yaml and its like are lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_train.config.yaml_tree import MOST_BYTES, settings_in
from dist_train.errors import CheckpointError, RunDirError
from dist_train.run_dir import saved
from dist_train.run_dir.files import last_line, read_json
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.status import read_status
from dist_train.untrusted import read_at_most


def copy_in_checkpoints(run_dir: RunDir) -> dict[str, Any]:
    """Returns the newest readable copy: `config` (text of config.yaml), `environment`, `attempt`.

    It is empty in a new run, and for checkpoints of versions that kept none.
    """
    try:
        names = saved.newest_first(run_dir.checkpoints)
    except CheckpointError:
        return {}
    for name in names:
        try:
            found = saved.read_tree(run_dir.checkpoints, name)
            return dict(found.get("run") or {})
        except (CheckpointError, AttributeError):
            continue
    return {}


def config_text(run_dir: RunDir) -> str:
    """Returns the text of config.yaml; of its copy in the checkpoints, if there is one.

    Raises:
        RunDirError: neither is there, or can be read.
    """
    text: str | None = copy_in_checkpoints(run_dir).get("config")
    if text is not None:
        return text
    try:
        return read_at_most(run_dir.config, MOST_BYTES).decode()
    except FileNotFoundError:
        raise RunDirError(
            f"{run_dir.path} is not a run directory: it has no {run_dir.config.name}", "name one, runs/NAME"
        ) from None
    except (OSError, ValueError) as error:
        raise RunDirError(f"{run_dir.config} cannot be read: {error}", _ANEW) from error


_ANEW = "restore it, or start anew with another --run.dir"


def engine_of(environment: Mapping[str, Any]) -> str:
    """Returns the run's `qat.engine` as it was resolved; "auto" of runs of versions that did not resolve it."""
    return str(environment.get("qat_engine", "auto"))


def recorded_config(run_dir: RunDir) -> dict[str, Any]:
    """Reads the settings that a run was started with.

    Raises:
        RunDirError: config.yaml is missing or damaged, and no checkpoint has a copy.
    """
    text = config_text(run_dir)
    try:
        recorded = settings_in(text.encode(), str(run_dir.config))
    except ValueError as error:
        raise RunDirError(f"{run_dir.config} cannot be read: {error}", _ANEW) from error
    if not isinstance(recorded.get("stages"), list):
        raise RunDirError(f"{run_dir.config} is damaged: it does not list the stages", _ANEW)
    return recorded


def recorded_environment(run_dir: RunDir) -> dict[str, Any]:
    """Reads the environment of a run: environment.json, else its copy in the checkpoints; empty where both are lost."""
    try:
        found = read_json(run_dir.environment)
    except RunDirError:
        found = None
    if isinstance(found, dict) and found:
        return found
    return dict(copy_in_checkpoints(run_dir).get("environment") or {})


def attempts_so_far(run_dir: RunDir) -> int:
    """Counts the attempts of a run, also where status.json is lost: the lines of each are in order."""
    known = [
        (read_status(run_dir) or {}).get("restarts"),
        copy_in_checkpoints(run_dir).get("attempt"),
    ]
    for path in (run_dir.metrics, *run_dir.ledger.glob("rank*.jsonl")):
        line = last_line(path)
        known.append(line.get("attempt") if isinstance(line, dict) else None)
    return 1 + max((number for number in known if isinstance(number, int)), default=-1)
