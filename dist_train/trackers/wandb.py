"""Weights & Biases: one run there per run here, also after resuming; offline without an account.

Upload an offline run later: `wandb sync --append RUN_DIR/logs/wandb/offline-run-*`.
"""

from __future__ import annotations

import netrc
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import wandb

from dist_train.errors import SetupError
from dist_train.run_dir.files import replace_text
from dist_train.run_dir.paths import RunDir
from dist_train.trackers.base import Tracker

if TYPE_CHECKING:
    from dist_train.config.tree import Config

_START_SECONDS = 30.0
_FINISH_SECONDS = 20.0  # the rest stays on the disk, for `wandb sync`


class Wandb(Tracker):
    """Sends scalars and the configuration, but no command line, environment variables, code or machine data."""

    def __init__(self, run_dir: RunDir, run_name: str, attempt: int) -> None:
        super().__init__(run_dir, run_name, attempt)
        self._stages: set[str] = set()

    def begin(self, config: Config) -> None:
        run_dir, settings = self.run_dir, config.wandb
        run_dir.wandb.mkdir(parents=True, exist_ok=True)
        mode = (os.environ.get("WANDB_MODE") if settings.mode == "auto" else settings.mode) or possible_mode()
        if mode == "online" and possible_mode() == "offline":
            raise SetupError("wandb has no API key", "wandb login, or --wandb.mode offline")
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=self.run_name,
            tags=settings.tags,
            id=_run_id(run_dir.wandb / "run_id"),
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=run_dir.logs,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(
                allow_val_change=True,  # a resumed run may log elsewhere, or keep other checkpoints
                console="off",
                silent=True,
                host="",
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                save_code=False,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
                init_timeout=_START_SECONDS,
                login_timeout=_START_SECONDS,
                finish_timeout=_FINISH_SECONDS,
            ),
        )

    def log(self, stage: str, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        axis = f"{stage}/step"
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(axis, hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=axis)
        self._run.log({axis: step, f"{stage}/epoch": epoch, **{f"{stage}/{name}": v for name, v in scalars.items()}})

    def close(self) -> None:
        # Closed while an error propagates: the run did not finish.
        self._run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def _run_id(path: Path) -> str:
    """Returns the run's id, generated once and kept in its directory."""
    if not path.exists():
        replace_text(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()


def possible_mode() -> Literal["online", "offline"]:
    """Returns "online" if an API key is configured: without one, wandb would wait for the user's answer."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")  # Path.home() raises for a user without a home
    try:
        known = netrc.netrc(file).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    return "online" if known else "offline"
