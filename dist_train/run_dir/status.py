"""Reads and writes status.json, which tells launchers and people what a run is doing."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Mapping
from typing import Any

import psutil

from dist_train.errors import DistTrainError, PeerError
from dist_train.run_dir.files import read_json, replace_json
from dist_train.run_dir.paths import RunDir


def fail(run_dir: RunDir, attempt: int, error: BaseException) -> None:
    """Notes a failure of any rank. An attempt's first failure stays, but a cause replaces its echo, a peer's PeerError.

    The echo of a rank that stopped as it was asked to is no failure. Nor is an error after the run is done, when ranks
    only have to leave.
    """
    fields = read_json(run_dir.status) or {"stage": None, "step": 0}
    echo = isinstance(error, PeerError)
    ours = fields.get("restarts") == attempt
    if ours and (fields.get("state") == "done" or (echo and fields.get("state") == "preempted")):
        return
    if not (ours and fields.get("state") == "failed") or (_is_echo(fields["error"]) and not echo):
        text = f"{type(error).__name__}: {error}"
        replace_json(run_dir.status, {**fields, "state": "failed", "restarts": attempt, "error": text})


def keep_traceback(run_dir: RunDir, attempt: int, rank: int, error: BaseException) -> None:
    """Writes the traceback of an error with its causes to logs/, if code that is not ours may have a part in it.

    An error for users names the file then.
    """
    if isinstance(error, PeerError) or (isinstance(error, DistTrainError) and error.__cause__ is None):
        return
    path = run_dir.failure(attempt, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace")
    if isinstance(error, DistTrainError):
        error.kept_in = str(path)


def preempt(run_dir: RunDir, attempt: int) -> None:
    """Notes that the attempt ended as it was asked to, unless a rank noted more than an echo of it."""
    fields = read_json(run_dir.status)
    if fields is None or fields.get("restarts") != attempt:
        return
    if fields.get("state") == "running" or (fields.get("state") == "failed" and _is_echo(fields.get("error"))):
        replace_json(
            run_dir.status, {**fields, "state": "preempted", "step": saved_step(run_dir, fields), "error": None}
        )


def was_preempted(run_dir: RunDir, attempt: int) -> bool:
    fields = read_json(run_dir.status)
    return fields is not None and (fields["state"], fields["restarts"]) == ("preempted", attempt)


def stopped_under_this_agent(run_dir: RunDir, environ: Mapping[str, str]) -> bool:
    """Tells if torchrun's agent restarted this rank although the ranks before it had ended as they were asked to.

    The agent does so if one of them had to be killed: to it, any exit code but 0 is a failure. A stop from before the
    agent began does not count.
    """
    if environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    fields = read_json(run_dir.status)
    if fields is None or fields["state"] != "preempted":
        return False
    return run_dir.status.stat().st_mtime > psutil.Process(os.getppid()).create_time()


def saved_step(run_dir: RunDir, fields: Mapping[str, Any]) -> int:
    """Returns the stage's steps in the newest checkpoint; 0 if that is of an earlier stage."""
    stage, latest = fields["stage"], read_json(run_dir.checkpoints / "latest.json")
    name = "" if latest is None else str(latest["name"])
    within = re.fullmatch(rf"{re.escape(str(stage))}-(\d+)(-open)?", name)
    if within is not None:
        return int(within[1])
    if name == f"{stage}-end":
        results = read_json(run_dir.results) or {"stages": {}}
        return int(results["stages"].get(stage, {}).get("steps", 0))
    return 0


def _is_echo(text: object) -> bool:
    return str(text).startswith(PeerError.__name__)
