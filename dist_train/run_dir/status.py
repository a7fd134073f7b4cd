"""Reads and writes status.json, which tells launchers and people what a run is doing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_train.errors import ForeignError, PeerError, RunDirError
from dist_train.run_dir.files import read_json, replace_json
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.saved import Moment, pointed


def read_status(run_dir: RunDir) -> dict[str, Any] | None:
    """Reads status.json; None where it is missing or damaged: the next attempt writes it anew."""
    try:
        fields = read_json(run_dir.status)
    except (RunDirError, OSError):
        return None
    whole = isinstance(fields, dict) and isinstance(fields.get("restarts"), int) and {"state", "stage"} <= set(fields)
    return fields if whole else None


def fail(run_dir: RunDir, attempt: int, error: BaseException) -> None:
    """Notes a failure of any rank. An attempt's first failure stays, but a cause replaces its echo, a peer's PeerError.

    The echo of a rank that stopped as it was asked to is no failure. Nor is an error after the run is done, when ranks
    only have to leave.
    """
    fields = read_status(run_dir) or {"stage": None, "step": 0}
    echo = isinstance(error, PeerError)
    ours = fields.get("restarts") == attempt
    if fields.get("restarts", 0) > attempt:
        return  # another start has taken the directory over
    if ours and (fields.get("state") == "done" or (echo and fields.get("state") == "preempted")):
        return
    if not (ours and fields.get("state") == "failed") or (_is_echo(fields["error"]) and not echo):
        text = error.message if isinstance(error, ForeignError) else f"{type(error).__name__}: {error}"
        replace_json(run_dir.status, {**fields, "state": "failed", "restarts": attempt, "error": text})


def preempt(run_dir: RunDir, attempt: int) -> None:
    """Notes that the attempt ended as it was asked to, unless a rank noted more than an echo of it."""
    fields = read_status(run_dir)
    if fields is None or fields.get("restarts") != attempt:
        return
    if fields.get("state") == "running" or (fields.get("state") == "failed" and _is_echo(fields.get("error"))):
        replace_json(
            run_dir.status, {**fields, "state": "preempted", "step": saved_step(run_dir, fields), "error": None}
        )


def was_preempted(run_dir: RunDir, attempt: int) -> bool:
    fields = read_status(run_dir)
    return fields is not None and (fields["state"], fields["restarts"]) == ("preempted", attempt)


def saved_step(run_dir: RunDir, fields: Mapping[str, Any]) -> int:
    """Returns the stage's steps in the newest checkpoint; 0 if that is of an earlier stage."""
    moment = Moment.named(pointed(run_dir.checkpoints)[0] or "")
    if moment is None or moment.stage != fields["stage"]:
        return 0
    return moment.step if moment.step is not None else steps_of(run_dir, moment.stage) or 0


def steps_of(run_dir: RunDir, stage: str) -> int | None:
    """Returns the steps of a finished stage by results.json; None where that does not tell."""
    try:
        steps = read_json(run_dir.results)["stages"][stage]["steps"]
    except (RunDirError, OSError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def _is_echo(text: object) -> bool:
    return str(text).startswith(PeerError.__name__)
