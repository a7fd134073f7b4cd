"""Opens a run directory for a start: whose it is, what is in it, and whether this config may go on in it."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from dist_train.config.load import differences, dump
from dist_train.config.tree import Config
from dist_train.distributed.polling import attempts
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, Problem, RunDirError, SetupError
from dist_train.pipeline.extension import can_extend
from dist_train.run_dir.files import read_json, replace_text
from dist_train.run_dir.lease import Lease, RankProcess, acquire
from dist_train.run_dir.leftovers import beside
from dist_train.run_dir.paths import RunDir, refuse_folders, refuse_foreign
from dist_train.run_dir.record import attempts_so_far, recorded_config
from dist_train.run_dir.saved import newest
from dist_train.run_dir.status import read_status
from dist_train.trackers.status import Status

_SEEN_SECONDS = 20.0  # how long a file of rank 0 may take to appear on all nodes


def earlier_results(config: Config, run_dir: RunDir) -> dict[str, Any] | None:
    """Returns the results if the run is done, else None. Refuses any other directory. Reads only."""
    refuse_folders(run_dir)
    refuse_foreign(run_dir)
    begun = newest(run_dir.checkpoints) is not None
    try:
        recorded = recorded_config(run_dir)
    except RunDirError:
        return None  # killed before the config was written, or lost with checkpoints that hold no copy
    if config.debug.fast_dev_run != recorded.get("debug", {}).get("fast_dev_run", False):
        raise RunDirError(
            f"{run_dir.path} holds a run with another debug.fast_dev_run", "--run.dir DIR, with a new or empty folder"
        )
    if config.debug.fast_dev_run or not begun:
        return None  # starts from the beginning
    changed = differences(recorded, config)
    if changed:
        raise ConfigError(
            changed,
            f"{run_dir.path} holds a run with other settings: undo the change to resume it, "
            "or start a new one with --run.name NEW or --run.dir DIR" + _going_on(config, run_dir, changed),
        )
    status = read_status(run_dir)
    if status is None or status["state"] != "done":
        return None
    try:
        results: dict[str, Any] | None = read_json(run_dir.results)
    except RunDirError:
        return None  # the checkpoint holds them, too
    return results


def _going_on(config: Config, run_dir: RunDir, changed: Sequence[Problem]) -> str:
    """Says how a new run goes on from this one: from its training, or from its weights where the model is the same."""
    if config.stages[0] != "train" or any(each.place.startswith(("model.", "stages")) for each in changed):
        return ""
    options = f"--run.dir NEW --model.init_from {shlex.quote(str(run_dir.path))}"
    if config.model.weights is not None:
        options += " --model.weights null --model.weights_key null"
    further = ""
    # A finished run has nothing more to train without more epochs.
    if any(each.place == "train.epochs" for each in changed) and can_extend(changed):
        further = f"--run.dir NEW --train.extend_from {shlex.quote(str(run_dir.path))}"
        further = f"\n  -> to train it further in a new run, train.epochs in all: the same command with {further}"
    return f"{further}\n  -> to go on from its weights in a new run: the same command with {options}"


def open_run_dir(config: Config, run_dir: RunDir, ranks: Sequence[RankProcess], leases: list[Lease]) -> int | None:
    """Creates and claims the run directory. Rank 0 only.

    Args:
        leases: gets the claim, which the caller gives back.

    Returns:
        the number of this attempt; None if the run is done.

    Raises:
        RunDirError: it cannot be created or written to, or another start uses it.
    """
    try:
        run_dir.path.mkdir(parents=True, exist_ok=True)
        leases.append(acquire(run_dir.path, ranks, lambda text: print(f"dist-train: {text}", file=sys.stderr)))
        if earlier_results(config, run_dir) is not None:
            return None
        if config.debug.fast_dev_run:
            run_dir.clear()
        run_dir.remove_leftovers()
        attempt = attempts_so_far(run_dir)
        run_dir.forget(attempt)
        Status(run_dir, config.run.name, attempt).set()
        if newest(run_dir.checkpoints) is None:
            replace_text(run_dir.config, dump(config))
    except OSError as error:
        raise RunDirError(
            f"{run_dir.path} cannot be used: {error}", "--run.dir DIR, with a folder that you can write to"
        ) from error
    return attempt


def check_shared(run_dir: RunDir, world: World) -> None:
    """Checks that every rank sees rank 0's files, so that the run does not first fail at a checkpoint. Collective.

    Raises:
        SetupError: the run directory is not on a shared file system.
    """
    if world.world_size == 1:
        return
    path = run_dir.path / world.on_rank_0(lambda: beside(run_dir.path / "token").name, "agreeing on a token")
    world.on_rank_0(lambda: path.touch(), "writing a token")
    for _ in attempts(_SEEN_SECONDS):
        if path.exists():
            break
        with suppress(OSError):  # the parent may be missing, too
            os.listdir(run_dir.path.parent)  # makes NFS refresh its cache
    seen = world.gather(path.exists())
    if world.is_main:
        path.unlink()
    if not all(seen):
        blind = [rank for rank, sees in enumerate(seen) if not sees]
        raise SetupError(
            f"run.dir is not shared: ranks {blind} do not see {run_dir.path} as rank 0 does",
            "--run.dir DIR, with a folder on a file system that all nodes share",
        )


def agree_on_config(config: Config, world: World) -> None:
    digests = world.gather(hashlib.sha256(dump(config).encode()).hexdigest())
    if len(set(digests)) > 1:
        raise SetupError(
            "the ranks were started with different configurations",
            "start all ranks with the same command and the same files",
        )
