"""Runs a config: its stages in order, from the first unfinished one."""

from __future__ import annotations

import hashlib
import os
import shlex
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from dist_train import registry
from dist_train.cluster.rank_plan import detect
from dist_train.config.load import differences, dump
from dist_train.config.tree import Config
from dist_train.console.progress import Progress
from dist_train.console.results_table import print_results
from dist_train.distributed.polling import attempts
from dist_train.distributed.process_group import join
from dist_train.distributed.watchdog.rank_side import watched
from dist_train.distributed.watchdog.stop_signals import listening
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, PeerError, Preempted, Problem, RunDirError, SetupError, keep_traceback
from dist_train.pipeline.arguments import check_arguments
from dist_train.pipeline.environment import describe
from dist_train.pipeline.set_up import advise, open_session
from dist_train.run_dir.files import read_json, replace_json, replace_text
from dist_train.run_dir.ledger import Ledger, NoLedger, record_expectation
from dist_train.run_dir.paths import RunDir, recorded_config, refuse_foreign
from dist_train.run_dir.status import fail, stopped_under_this_agent, was_preempted
from dist_train.stages.base import Stage, Stopwatch
from dist_train.stages.context import Context
from dist_train.trackers.base import Trackers
from dist_train.trackers.status import Status

_SEEN_SECONDS = 20.0  # how long a file of rank 0 may take to appear on all nodes


def run(config: Config, warnings: Sequence[Problem] = ()) -> dict[str, Any]:
    """Runs or resumes the config on all ranks; every rank calls it.

    Args:
        warnings: warnings from reading the configuration; rank 0 prints them once, with its own.

    Returns:
        the content of results.json.

    Raises:
        ConfigError: the run directory holds a run with other settings that affect the result.
        RunDirError: the directory is not a run directory.
        Preempted: the run was asked to stop (SIGTERM, SIGUSR2, the file STOP), and can be resumed.
        DistTrainError: this rank failed; PeerError if another rank was the cause.
    """
    check_arguments(config)
    run_dir = RunDir(config.run_dir)
    done = _earlier_results(config, run_dir)
    if done is not None:
        if detect(os.environ).rank == 0:
            print(f"this run is done: {run_dir.path}; to start another, choose another --run.name or --run.dir")
            print_results(done)
        return done
    if stopped_under_this_agent(run_dir, os.environ):
        raise Preempted("the run was asked to stop, so it does not resume although the launcher restarted it")
    attempt: int | None = None
    try:
        with (
            listening() as stop,
            watched(config, stop) as heartbeat,
            join(config.run, config.debug.collectives) as world,
        ):
            world.stop, world.heartbeat = stop, heartbeat
            _agree_on_config(config, world)
            attempt = world.on_rank_0(lambda: _open(config, run_dir), "opening the run directory")
            heartbeat.identify(world.rank, world.world_size, attempt)
            _check_shared(run_dir, world)
            return _run(config, run_dir, world, attempt, warnings)
    except BaseException as error:
        if attempt is not None and not isinstance(error, Preempted):
            with suppress(OSError):  # a full disk must not hide the original error
                fail(run_dir, attempt, error)
            if not isinstance(error, PeerError):
                keep_traceback(error, run_dir.failure(attempt, detect(os.environ).rank))
            if isinstance(error, PeerError) and was_preempted(run_dir, attempt):
                reason = "another rank was asked to stop and did not stop in time; the last checkpoint is kept"
                raise Preempted(reason) from error
        raise


def _earlier_results(config: Config, run_dir: RunDir) -> dict[str, Any] | None:
    """Returns the results if the run is done, else None. Refuses any other directory. Reads only."""
    if not run_dir.status.exists():
        refuse_foreign(run_dir)
        return None
    if not run_dir.config.exists():
        return None  # killed before the config was written
    recorded = recorded_config(run_dir)
    if config.debug.fast_dev_run != recorded.get("debug", {}).get("fast_dev_run", False):
        raise RunDirError(
            f"{run_dir.path} holds a run with another debug.fast_dev_run", "--run.dir DIR, with a new or empty folder"
        )
    if config.debug.fast_dev_run or not (run_dir.checkpoints / "latest.json").exists():
        return None  # starts from the beginning
    changed = differences(recorded, config)
    if changed:
        raise ConfigError(
            changed,
            f"{run_dir.path} holds a run with other settings: undo the change to resume it, "
            "or start a new one with --run.name NEW or --run.dir DIR" + _going_on(config, run_dir, changed),
        )
    status = read_json(run_dir.status)
    results: dict[str, Any] | None = read_json(run_dir.results)
    return results if status is not None and status["state"] == "done" else None


def _going_on(config: Config, run_dir: RunDir, changed: Sequence[Problem]) -> str:
    """Says how a new run goes on from the weights of this one, where it would train the same model."""
    if config.stages[0] != "train" or any(each.place.startswith(("model.", "stages")) for each in changed):
        return ""
    options = f"--run.dir NEW --model.init_from {shlex.quote(str(run_dir.path))}"
    if config.model.weights is not None:
        options += " --model.weights null --model.weights_key null"
    return f"\n  -> to go on from its weights in a new run: the same command with {options}"


def _open(config: Config, run_dir: RunDir) -> int:
    """Creates the run directory and returns the number of this attempt. Rank 0 only.

    Raises:
        RunDirError: it cannot be created or written to.
    """
    try:
        if config.debug.fast_dev_run:
            run_dir.clear()
        run_dir.path.mkdir(parents=True, exist_ok=True)
        status = read_json(run_dir.status)
        attempt = 0 if status is None else int(status["restarts"]) + 1
        run_dir.forget(attempt)
        Status(run_dir, config.run.name, attempt).set()
        if not (run_dir.checkpoints / "latest.json").exists():
            replace_text(run_dir.config, dump(config))
    except OSError as error:
        raise RunDirError(
            f"{run_dir.path} cannot be used: {error}", "--run.dir DIR, with a folder that you can write to"
        ) from error
    return attempt


def _check_shared(run_dir: RunDir, world: World) -> None:
    """Checks that every rank sees rank 0's files, so that the run does not first fail at a checkpoint. Collective.

    Raises:
        SetupError: the run directory is not on a shared file system.
    """
    if world.world_size == 1:
        return
    token = world.on_rank_0(lambda: uuid.uuid4().hex, "agreeing on a token")
    path = run_dir.path / f".token-{token}"
    world.on_rank_0(lambda: path.write_text(token) and None, "writing a token")
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


def _run(config: Config, run_dir: RunDir, world: World, attempt: int, warnings: Sequence[Problem]) -> dict[str, Any]:
    known = read_json(run_dir.environment) or {}
    threads = known.get("threads_per_rank") if config.run.threads_per_rank == "auto" else None
    began = (run_dir.checkpoints / "latest.json").exists()
    precision = known.get("precision") if began else None
    session = open_session(config, run_dir, world, threads=threads, precision=precision)
    choices, progress = session.choices, session.progress
    world.barrier("reading the former environment")
    if world.is_main:
        replace_json(run_dir.environment, describe(world, session.threads, choices.strategy, choices.precision))
    for line in choices.lines:
        progress.say(line)
    status = Status(run_dir, config.run.name, attempt)
    trackers = Trackers([], [status] if world.is_main else [], progress.say)
    for name in config.trackers if world.is_main else []:
        trackers.add(name, partial(registry.trackers.get(name), run_dir, config.run.name, attempt), config)
    ledger = Ledger(run_dir, world.rank, world.world_size, attempt) if config.debug.ledger else NoLedger()
    try:
        context = session.build(trackers, ledger)
        advise(context, warnings)
        if world.is_main and config.debug.ledger:
            _expect(context)
        _run_stages(context, attempt, status)
    except BaseException as error:
        if isinstance(error, Preempted) and world.is_main:
            status.preempted()
            run_dir.stop.unlink(missing_ok=True)  # the request is fulfilled, so the same command may resume
        with suppress(OSError):
            ledger.close()
            trackers.close()
        raise
    # The status becomes `done` only after every rank is done.
    ledger.close()
    world.barrier("end")
    if world.is_main:
        context.checkpoints.keep_ends()
        replace_json(run_dir.results, context.results)
        status.set(state="done")
        run_dir.stop.unlink(missing_ok=True)  # a late request must not stop the next run
        trackers.close()
        print_results(context.results)
        _say_paths(run_dir, progress)
    return context.results


def _expect(context: Context) -> None:
    """Records the number of samples that an epoch consumes, for the ledger's check."""
    data, size = context.config.data, context.data.train_samples
    per_epoch = size - size % data.global_batch_size if data.drop_last else size
    if context.config.debug.fast_dev_run:
        per_epoch = min(per_epoch, 2 * data.global_batch_size)
    record_expectation(context.run_dir, size, per_epoch)


def _run_stages(context: Context, attempt: int, status: Status) -> None:
    config, world, checkpoints = context.config, context.world, context.checkpoints
    interrupted = checkpoints.newest()
    if interrupted is not None:
        _take_up(context, interrupted, attempt)
    context.results["world_size"] = world.world_size
    if world.world_size not in context.results["world_sizes"]:
        context.results["world_sizes"].append(world.world_size)
    for name in config.stages:
        stage: Stage = registry.stages.get(name)(name, getattr(config, name, None))
        done = name in checkpoints.finished
        if not done and world.stop_agreed():
            raise Preempted(f"stopped before {name}; the finished stages are saved")
        if interrupted is not None and not interrupted["finished"] and interrupted["stage"] == name:
            context.resume = interrupted["payload"]
        product = checkpoints.product(name) if done else _run_stage(stage, context, status)
        stage.restore(context, product)
        context.products[name] = product
        if not done:
            checkpoints.save_stage(name, product)
            if world.is_main:
                replace_json(context.run_dir.results, context.results)


def _take_up(context: Context, interrupted: dict[str, Any], attempt: int) -> None:
    """Continues from the newest checkpoint of an earlier attempt.

    Raises:
        DataError: data or weights have changed.
    """
    context.data.require_same_data(interrupted["data"])
    context.require_same_weights(interrupted["results"])
    context.same_model.restore(interrupted["same_model"])
    context.results.clear()
    context.results.update(interrupted["results"])
    stage = interrupted["stage"]
    place = f"after {stage}" if interrupted["finished"] else f"in {stage} at step {interrupted['payload']['step']}"
    context.progress.say(f"resuming (attempt {attempt}) {place}")


def _run_stage(stage: Stage, context: Context, status: Status) -> dict[str, Any]:
    """Runs a stage and returns its product; records its seconds in the results."""
    world = context.world
    world.heartbeat.at_step(stage.name, 0)
    world.heartbeat.begin("set-up", at_least=world.timeout)
    if world.is_main:
        status.set(state="running", stage=stage.name, step=0)
    stopwatch = Stopwatch()
    product = stage.run(context)
    context.results["stages"].setdefault(stage.name, {})["seconds"] = stopwatch.seconds
    context.resume = None
    return product


def _agree_on_config(config: Config, world: World) -> None:
    digests = world.gather(hashlib.sha256(dump(config).encode()).hexdigest())
    if len(set(digests)) > 1:
        raise SetupError(
            "the ranks were started with different configurations",
            "start all ranks with the same command and the same files",
        )


def _say_paths(run_dir: RunDir, progress: Progress) -> None:
    for path, what in (
        (run_dir.results, "results"),
        (run_dir.metrics, "metrics"),
        (run_dir.export, "artifact"),
        (run_dir.checkpoints, "checkpoints"),
    ):
        if path.exists():
            progress.say(f"{what:12s} {path}")
