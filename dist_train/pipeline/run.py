"""Runs a config: its stages in order, from the first unfinished one."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from dist_train import registry
from dist_train.cluster.elastic import Agent, agent_of
from dist_train.cluster.rank_plan import detect
from dist_train.config.tree import Config
from dist_train.console.progress import Progress
from dist_train.console.results_table import print_results
from dist_train.distributed.process_group import join
from dist_train.distributed.watchdog.rank_side import watched
from dist_train.distributed.watchdog.stop_signals import listening
from dist_train.distributed.world import World
from dist_train.errors import DataError, PeerError, Preempted, Problem, keep_traceback
from dist_train.pipeline.after_stop import after_lost_peer, after_stop
from dist_train.pipeline.arguments import check_arguments
from dist_train.pipeline.environment import describe
from dist_train.pipeline.extension import take_up_training
from dist_train.pipeline.home import Home
from dist_train.pipeline.opening import agree_on_config, check_shared, earlier_results, open_run_dir
from dist_train.pipeline.packing import OFF, settled_pack
from dist_train.pipeline.recovery import agree_on_checkpoint, rebuild_config, record
from dist_train.pipeline.resumed_data import compare_files, require_same_content
from dist_train.pipeline.sampling import expect, require_same_weights
from dist_train.pipeline.set_up import advise, open_session
from dist_train.run_dir.agents import let_go_on, restart_mark, stopped_under_this_agent
from dist_train.run_dir.files import replace_json
from dist_train.run_dir.lease import PATIENCE_SECONDS, Lease, this_process
from dist_train.run_dir.ledger import Ledger, NoLedger
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.record import engine_of, recorded_environment
from dist_train.run_dir.replica_ledger import ReplicaLedger
from dist_train.run_dir.retry import retried, told
from dist_train.run_dir.status import fail, was_preempted
from dist_train.stages.base import Stage, Stopwatch
from dist_train.stages.context import Context
from dist_train.stages.train import TRAINING
from dist_train.trackers.base import Trackers
from dist_train.trackers.status import Status


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
        NodeLeft: a Preempted that this rank's agent is to answer with a restart, as another node leaves.
        DistTrainError: this rank failed; PeerError if another rank was the cause.
    """
    check_arguments(config)
    run_dir = RunDir(config.run_dir)
    # Of a run at an object store nothing is known before rank 0 has it.
    done = earlier_results(config, run_dir) if config.store is None else None
    if done is not None:
        return _shown(done, run_dir)
    if stopped_under_this_agent(run_dir, os.environ):
        raise Preempted("the run was asked to stop, so it does not resume although the launcher restarted it")
    agent = agent_of(os.environ)
    if agent.elastic and run_dir.status.exists():
        let_go_on(run_dir, os.environ, more=1)  # where the ranks fail to meet, their next restart goes on, too
    attempt: int | None = None
    leases: list[Lease] = []
    home = Home(config, run_dir)
    try:
        with (
            listening() as stop,
            watched(config, stop, agent, restart_mark(run_dir, os.environ, 1)) as heartbeat,
            # The watchdog tells a rank that is slow from one that is stuck; a timeout of torch's does not.
            join(config.run, config.debug.collectives, stop, at_least=heartbeat.verdict_by) as world,
        ):
            world.stop, world.heartbeat = stop, heartbeat
            home.heed(world)
            agree_on_config(config, world)
            ranks = world.gather(this_process(world.rank))
            world.on_rank_0(lambda: home.take(ranks[0]), "taking the run from its store", home.patience(world.timeout))
            attempt = world.on_rank_0(
                lambda: open_run_dir(config, run_dir, ranks, leases),
                "opening the run directory",
                world.timeout + PATIENCE_SECONDS,
            )
            if attempt is None:  # the start that was before this one has finished the run
                done = earlier_results(config, run_dir)
                assert done is not None
                return _shown(done, run_dir)
            heartbeat.identify(world.rank, world.world_size, attempt, leases[0].number if leases else None)
            check_shared(run_dir, world)
            if agent.elastic:
                let_go_on(run_dir, os.environ)
            return _run(config, run_dir, world, attempt, warnings, agent, home)
    except BaseException as error:
        if attempt is not None and not isinstance(error, Preempted):
            with suppress(OSError):  # a full disk must not hide the original error
                fail(run_dir, attempt, error)
            if not isinstance(error, PeerError):
                keep_traceback(error, run_dir.failure(attempt, detect(os.environ).rank))
            if isinstance(error, PeerError) and was_preempted(run_dir, attempt):
                raise after_lost_peer(run_dir, attempt, stop, agent) from error
        raise
    finally:
        for lease in leases:
            lease.release()
        home.leave()


def _shown(done: dict[str, Any], run_dir: RunDir) -> dict[str, Any]:
    """Returns the results of a run that is done; rank 0 prints them."""
    if detect(os.environ).rank == 0:
        print(f"this run is done: {run_dir.path}; to start another, choose another --run.name or --run.dir")
        print_results(done)
    return done


def _run(
    config: Config, run_dir: RunDir, world: World, attempt: int, warnings: Sequence[Problem], agent: Agent, home: Home
) -> dict[str, Any]:
    say = Progress(world.is_main, config.log.interval).warn
    began = agree_on_checkpoint(run_dir, config.stages, world, say) is not None
    known: dict[str, Any] = world.on_rank_0(lambda: recorded_environment(run_dir), "reading the former environment")
    if began and not known:
        say(f"{run_dir.environment} is lost, and no checkpoint has a copy: threads, precision, engine are chosen anew")
    threads = known.get("threads_per_rank") if config.run.threads_per_rank == "auto" else None
    kept = (known.get("precision"), engine_of(known)) if began and known else (None, None)
    # A run that is older than packs began without one.
    pack = known.get("pack", OFF) if began and known else None
    session = open_session(
        config, run_dir, world, threads=threads, precision=kept[0], engine=kept[1], pack=pack, packs=True
    )
    choices, progress = session.choices, session.progress
    copies: dict[str, Any] = {}
    if world.is_main:
        environment = describe(world, session.threads, choices.strategy, choices.precision, choices.engine)
        environment["pack"] = settled_pack(session.config.data)
        retry, path = config.checkpoint.retry, run_dir.environment
        retried(lambda: replace_json(path, environment), retry, str(path))
        copies = record(rebuild_config(run_dir, config, say), environment, attempt)
    for line in choices.lines:
        progress.say(line)
    if began and known.get("strategy", choices.strategy) != choices.strategy:
        progress.say(f"strategy {choices.strategy} from here on; it was {known['strategy']}")
    status = Status(run_dir, config.run.name, attempt, config.checkpoint.retry)
    trackers = Trackers([], [status] if world.is_main else [], progress.say)
    for name in config.trackers if world.is_main else []:
        trackers.add(name, partial(registry.trackers.get(name), run_dir, config.run.name, attempt), config)
    ledger = _ledger(config, run_dir, world, attempt)
    try:
        context = session.build(trackers, ledger, copies)
        beat = partial(world.heartbeat.enter, "save")
        context.checkpoints.published_by(home.publish)
        advise(context, warnings)
        with world.heartbeat.within("save"):
            home.publish(beat)  # so that it is seen there before the first checkpoint
        try:
            _run_stages(context, attempt, status)
        except BaseException:
            context.checkpoints.close(progress.warn)
            raise
    except BaseException as error:
        if isinstance(error, Preempted):
            if world.is_main:
                status.preempted()
            error = after_stop(error, world, run_dir, agent, config.stop.grace)
        with suppress(OSError):
            ledger.close()
            trackers.close()
        raise error
    # The status becomes `done` only after every rank is done.
    ledger.close()
    world.barrier("end")
    if world.is_main:
        told(context.checkpoints.keep_ends, run_dir.checkpoints)
        retry = config.checkpoint.retry
        retried(lambda: replace_json(run_dir.results, context.results), retry, str(run_dir.results))
        status.end("done")
        run_dir.stop.unlink(missing_ok=True)  # a late request must not stop the next run
        run_dir.forget_agents()
        trackers.close()
        home.bring_back(beat)
        print_results(context.results)
        _say_paths(run_dir, progress)
    return context.results


def _ledger(config: Config, run_dir: RunDir, world: World, attempt: int) -> Ledger | ReplicaLedger | NoLedger:
    if not config.debug.ledger:
        return NoLedger()
    if config.strategy == "ft":
        return ReplicaLedger(run_dir, attempt)
    return Ledger(run_dir, world.rank, world.world_size, attempt)


def _run_stages(context: Context, attempt: int, status: Status) -> None:
    config, world, checkpoints = context.config, context.world, context.checkpoints
    interrupted = checkpoints.newest()
    if interrupted is not None:
        _take_up(context, interrupted, attempt)
    else:
        take_up_training(context)
    if world.is_main and config.debug.ledger:
        expect(context)
    if not config.debug.fast_dev_run:  # which nothing resumes
        data, record = context.data, context.run_dir.data_files
        compare_files(config.data, data.splits, record, world, interrupted is None, context.progress.warn)
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
            _require_finite(context)
            checkpoints.save_stage(name, product)
            if world.is_main:
                told(lambda: replace_json(context.run_dir.results, context.results), context.run_dir.results)
        product.pop(TRAINING, None)  # as large as the model, and of no use to later stages


def _require_finite(context: Context) -> None:
    """Raises DataError where a task's own metric is no number: results.json holds none."""
    for model, figures in context.results["models"].items():
        for metric, value in figures.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise DataError(
                    f"the metric {metric} of {model} is {value}",
                    f"let the task {context.config.task.name} give a number, such as 0, where nothing is counted",
                )


def _take_up(context: Context, interrupted: dict[str, Any], attempt: int) -> None:
    """Continues from the newest checkpoint of an earlier attempt.

    Raises:
        DataError: data or weights have changed.
    """
    context.data.require_same_data(interrupted["data"])
    # A checkpoint of an earlier version holds no content.
    require_same_content(context.data, interrupted.get("content", {}), context.progress.warn)
    require_same_weights(context.data, interrupted.get("row_weights", ""))
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


def _say_paths(run_dir: RunDir, progress: Progress) -> None:
    for path, what in (
        (run_dir.results, "results"),
        (run_dir.metrics, "metrics"),
        (run_dir.export, "artifact"),
        (run_dir.checkpoints, "checkpoints"),
    ):
        if path.exists():
            progress.say(f"{what:12s} {path}")
