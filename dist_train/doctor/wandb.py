"""Checks what `trackers: [wandb]` would do here; tells that there is a key, and never the key."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

from dist_train.doctor.base import Line, Subject, bad, good, warning
from dist_train.errors import EXIT_CONFIG

_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")  # wandb.Settings.mode, and its old names


def check(subject: Subject) -> Iterator[Line]:
    if importlib.util.find_spec("wandb") is None:
        yield subject.lacking("wandb", "wandb is not installed", "pip install wandb")
        return
    from dist_train.trackers.wandb import possible_mode

    key = "an API key is configured" if possible_mode() == "online" else "no API key is configured"
    mode = os.environ.get("WANDB_MODE")
    if mode is None:
        yield good(f"wandb would be {possible_mode()}: {key}")
    elif mode not in _MODES:
        yield bad(f"WANDB_MODE is none of {', '.join(_MODES)}", "export WANDB_MODE=offline, or unset it", EXIT_CONFIG)
    elif mode == "online" and possible_mode() == "offline":
        yield warning(f"WANDB_MODE is online, but {key}", "wandb login, or export WANDB_MODE=offline")
    else:
        yield good(f"wandb would be {mode}, as WANDB_MODE says: {key}")
