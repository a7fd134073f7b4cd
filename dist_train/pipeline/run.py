"""A run: its stages in order, resumed at the first unfinished one."""

from __future__ import annotations

import hashlib
import os
import time
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
from dist_train.distributed.process_group import join
from dist_train.distributed.watchdog.rank_side import watched
from dist_train.distributed.watchdog.stop_signals import listening
from dist_train.distributed.world import World, resolve_threads
from dist_train.errors import ConfigError, PeerError, Preempted, Problem, RunDirError, SetupError
from dist_train.pipeline.auto import choose, look
from dist_train.pipeline.environment import describe
from dist_train.pipeline.set_up import advise, check_arguments, configure_torch, make_context
from dist_train.run_dir.files import read_json, replace_json, replace_text
from dist_train.run_dir.ledger import Ledger, NoLedger, record_expectation
from dist_train.run_dir.paths import RunDir, recorded_config, refuse_foreign
from dist_train.run_dir.status import fail, stopped_under_this_agent, was_preempted
from dist_train.stages.base import Stage, Stopwatch
from dist_train.stages.context import Context
from dist_train.trackers.base import Trackers
from dist_train.trackers.status import Status

_SEEN_SECONDS = 20.0  # for what rank 0 wrote to be seen by all


def run(config: Config, warnings: Sequence[Problem] = ()) -> dict[str, Any]:
    """Runs or resumes what the config describes, on all ranks; every rank of the world calls it.

    Args:
        warnings: of the configuration's reading; said once, by rank 0, with those that are found here.

    Returns:
        what results.json holds.

    Raises:
        ConfigError: the run directory holds a run with other settings that determine the result.
        RunDirError: the directory is not a run's.
        Preempted: it was asked to stop (SIGTERM, SIGUSR2, the file STOP), and can be resumed.
        DistTrainError: as it happened; PeerError where another rank was the cause.
    """
    check_arguments(config)
    run_dir = RunDir(config.run_dir)
    done = _earlier_results(config, run_dir)
    if done is not None:
        if detect(os.environ).rank == 0:
            print(f"this run is done: {run_dir.path}; for another one choose another --run.name or --run.dir")
            print_results(done)
        return done
    if stopped_under_this_agent(run_dir, os.environ):
        raise Preempted("it was asked to stop, and so does not go on although the launcher started it again")
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
            with suppress(OSError):  # a full disk must not hide the error that it caused
                fail(run_dir, attempt, error)
            if isinstance(error, PeerError) and was_preempted(run_dir, attempt):
                raise Preempted("another rank was asked to stop and given up; the last checkpoint serves") from error
        raise


def _earlier_results(config: Config, run_dir: RunDir) -> dict[str, Any] | None:
    """The results of a finished run; refuses a directory that belongs to something else. Reads only."""
    if not run_dir.status.exists():
        refuse_foreign(run_dir)
        return None
    if not run_dir.config.exists():
        return None  # killed between the two
    recorded = recorded_config(run_dir)
    if config.debug.fast_dev_run != recorded.get("debug", {}).get("fast_dev_run", False):
        raise RunDirError(f"{run_dir.path} holds a run of another kind", "--run.dir DIR, with a new or an empty folder")
    if config.debug.fast_dev_run or not (run_dir.checkpoints / "latest.json").exists():
        return None  # begins anew
    changed = differences(recorded, config)
    if changed:
        raise ConfigError(
            changed,
            f"{run_dir.path} holds a run with other settings: undo the change to resume it, "
            "or start a new one with --run.name NEW or --run.dir DIR",
        )
    status = read_json(run_dir.status)
    results: dict[str, Any] | None = read_json(run_dir.results)
    return results if status is not None and status["state"] == "done" else None


def _open(config: Config, run_dir: RunDir) -> int:
    """Rank 0: makes the run directory and returns the number of this attempt.

    Raises:
        RunDirError: it cannot be made or written to.
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
            f"{run_dir.path} cannot be used: {error}", "--run.dir DIR, one that you can write to"
        ) from error
    return attempt


def _check_shared(run_dir: RunDir, world: World) -> None:
    """Every rank sees what rank 0 writes, or the run stops here rather than at its first checkpoint.

    Raises:
        SetupError: the run directory is not on a shared file system.
    """
    if world.world_size == 1:
        return
    token = world.on_rank_0(lambda: uuid.uuid4().hex, "agreeing on a token")
    path = run_dir.path / f".token-{token}"
    world.on_rank_0(lambda: path.write_text(token) and None, "writing a token")
    end = time.monotonic() + _SEEN_SECONDS
    while not path.exists() and time.monotonic() < end:
        with suppress(OSError):  # not even the parent is there
            os.listdir(run_dir.path.parent)  # asks NFS anew
        time.sleep(0.05)
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
    threads_kept = threads is not None
    threads = threads or resolve_threads(config.run.threads_per_rank, world)
    configure_torch(config, threads)
    began = (run_dir.checkpoints / "latest.json").exists()
    choices = choose(config, look(world, threads, threads_kept), os.environ, known.get("precision") if began else None)
    world.barrier("reading the former environment")
    if world.is_main:
        replace_json(run_dir.environment, describe(world, threads, choices.strategy, choices.precision))
    progress = Progress(world.is_main, config.log.interval)
    for line in choices.lines:
        progress.say(line)
    status = Status(run_dir, config.run.name, attempt)
    trackers = Trackers([], [status] if world.is_main else [], progress.say)
    for name in config.trackers if world.is_main else []:
        trackers.add(name, partial(registry.trackers.get(name), run_dir, config.run.name, attempt), config)
    ledger = Ledger(run_dir, world.rank, world.world_size, attempt) if config.debug.ledger else NoLedger()
    try:
        context = make_context(config, run_dir, world, threads, progress, trackers, ledger, choices)
        advise(context, warnings)
        if world.is_main and config.debug.ledger:
            _expect(context)
        _run_stages(context, attempt, status)
    except BaseException as error:
        if isinstance(error, Preempted) and world.is_main:
            status.preempted()
            run_dir.stop.unlink(missing_ok=True)  # it is honoured: the same command is to go on
        with suppress(OSError):
            ledger.close()
            trackers.close()
        raise
    # Every rank is done before the status says so.
    ledger.close()
    world.barrier("end")
    if world.is_main:
        context.folder.keep_only(set(context.finished.values()))  # a kill may have come before older ones were removed
        replace_json(run_dir.results, context.results)
        status.set(state="done")
        run_dir.stop.unlink(missing_ok=True)  # it came too late
        trackers.close()
        print_results(context.results)
        _say_paths(run_dir, progress)
    return context.results


def _expect(context: Context) -> None:
    """Tells the ledger what an epoch consumes."""
    data, size = context.config.data, context.train_samples
    per_epoch = size - size % data.global_batch_size if data.drop_last else size
    if context.config.debug.fast_dev_run:
        per_epoch = min(per_epoch, 2 * data.global_batch_size)
    record_expectation(context.run_dir, size, per_epoch)


def _run_stages(context: Context, attempt: int, status: Status) -> None:
    config, world, folder = context.config, context.world, context.folder
    interrupted: dict[str, Any] | None = None
    latest = folder.latest
    if latest is not None:
        interrupted = folder.load(latest)
        context.require_same_data(interrupted["data"])
        context.require_same_weights(interrupted["results"])
        context.same_model.restore(interrupted["same_model"])
        context.finished = dict(interrupted["finished_stages"])
        context.results = interrupted["results"]
        context.retention.restore(interrupted["retention"])
        where = (
            f"after {interrupted['stage']}"
            if interrupted["finished"]
            else f"in {interrupted['stage']} at step {interrupted['payload']['step']}"
        )
        context.progress.say(f"resuming (attempt {attempt}) {where}")
    context.results["world_size"] = world.world_size
    if world.world_size not in context.results["world_sizes"]:
        context.results["world_sizes"].append(world.world_size)
    for name in config.stages:
        stage: Stage = registry.stages.get(name)(name, getattr(config, name, None))
        if name in context.finished:
            stage.restore(context, folder.load(context.finished[name])["payload"])
            continue
        if world.stop_agreed():
            raise Preempted(f"stopped before {name}; what was done until there is saved")
        if interrupted is not None and not interrupted["finished"] and interrupted["stage"] == name:
            context.resume = interrupted["payload"]
        world.heartbeat.at_step(name, 0)
        world.heartbeat.begin("set-up", at_least=world.timeout)
        if world.is_main:
            status.set(state="running", stage=name, step=0)
        stopwatch = Stopwatch()
        product = stage.run(context)
        context.results["stages"].setdefault(name, {})["seconds"] = stopwatch.seconds
        stage.restore(context, product)
        context.save_stage(name, product)
        if world.is_main:
            replace_json(context.run_dir.results, context.results)


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
