"""status.json: what a run is doing, for launchers and people; replaced atomically."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import psutil

from dist_train.errors import PeerError
from dist_train.run_dir.files import read_json, replace_json
from dist_train.run_dir.paths import RunDir


def fail(run_dir: RunDir, attempt: int, error: BaseException) -> None:
    """Notes a failure, by whichever rank it happened on. The first one of an attempt stays, but a cause replaces its echo on a peer.

    What is only the echo of a rank that stopped as it was asked to is no failure. Nor is what befalls a rank that has only to leave: done
    is done.
    """
    fields = read_json(run_dir.status) or {"stage": None, "step": 0}
    echo = isinstance(error, PeerError)
    ours = fields.get("restarts") == attempt
    if ours and (fields.get("state") == "done" or (echo and fields.get("state") == "preempted")):
        return
    if not (ours and fields.get("state") == "failed") or (_is_echo(fields["error"]) and not echo):
        text = f"{type(error).__name__}: {error}"
        replace_json(run_dir.status, {**fields, "state": "failed", "restarts": attempt, "error": text})


def preempt(run_dir: RunDir, attempt: int) -> None:
    """Notes that the attempt ended as it was asked to, where no rank noted more than the echo of that."""
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
    """Whether torchrun's agent started this rank again although the ranks before it ended as they were asked to.

    It does so where one of them had to be killed: any exit code but 0 is a failure to it. A stop that was honoured before the agent
    began is none that it overlooked.
    """
    if environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    fields = read_json(run_dir.status)
    if fields is None or fields["state"] != "preempted":
        return False
    return run_dir.status.stat().st_mtime > psutil.Process(os.getppid()).create_time()


def saved_step(run_dir: RunDir, fields: Mapping[str, Any]) -> int:
    """How many steps of the stage the newest checkpoint holds: 0 where it is an earlier stage's, and what it did if it is its end."""
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
