"""Goes on from another run's training (`train.extend_from`), in a run directory of its own: nothing is overwritten."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train.config.load import differences
from dist_train.config.tree import Config
from dist_train.data.content import Content, is_random
from dist_train.errors import CheckpointError, ConfigError, DataError, Problem, RunDirError
from dist_train.models.fingerprint import FLOAT
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.record import recorded_config
from dist_train.stages.context import Context
from dist_train.stages.train import TRAINING

_KEY = "train.extend_from"
# Settings of which steps and samples, or the tensors of model and optimizer, are functions.
_SAME = (
    "run.seed",
    "data.name",
    "data.args",
    "data.global_batch_size",
    "data.drop_last",
    "data.sampling",
    "data.split",
    "model.name",
    "model.args",
    "task.name",
    "train.optim.name",
    "train.optim.groups",
    "train.freeze",
)


def extends(config: Config) -> bool:
    """Tells whether `train` goes on from another run; a fast development run never does."""
    return config.train.extend_from is not None and "train" in config.stages and not config.debug.fast_dev_run


def can_extend(changed: Sequence[Problem]) -> bool:
    """Tells whether a run with these changed settings can go on from the training of the unchanged one."""
    return not any(problem.place == key or problem.place.startswith(f"{key}.") for problem in changed for key in _SAME)


def check_extension(config: Config) -> None:
    """Compares the settings with those of the run to go on from, before ranks meet.

    Raises:
        ConfigError: it is no run, or data, model or optimizer are others.
    """
    source = config.train.extend_from
    if not extends(config) or CheckpointFolder(RunDir(config.run_dir).checkpoints).latest is not None:
        return
    assert source is not None
    try:
        recorded = recorded_config(RunDir(source))
    except RunDirError as error:
        raise ConfigError(
            [Problem(_KEY, error.message, hint="give the directory of a run, as in runs/NAME")]
        ) from error
    if "train" not in recorded["stages"]:
        hint = f"--model.init_from {source} --{_KEY} null"
        raise ConfigError([Problem(_KEY, f"{source} has no stage train", hint=hint)])
    changed = [problem for problem in differences(recorded, config) if not can_extend([problem])]
    if changed:
        raise ConfigError(
            changed,
            f"{_KEY} goes on from the training of {source}, which had other settings: undo the change, or start from "
            f"its weights alone: --{_KEY} null --model.init_from {source}",
        )


def take_up_training(context: Context) -> None:
    """Loads the state to go on from into `context.extension`, and notes it in the results. Collective.

    Raises:
        DataError: the run has no such state, its data or model are others, or there is nothing left to train.
    """
    config, world = context.config, context.world
    source = config.train.extend_from
    if source is None or not extends(config):
        return
    name, record, state = _read(source)
    if len(set(world.gather((name, state["step"])))) > 1:
        raise DataError(
            f"{_KEY}: {source} is not the same on all ranks, or is still running",
            "wait for its end; give a path on a file system that all nodes share",
        )
    _require_same(context, source, record)
    steps = context.data.train_loader("train").steps_per_epoch
    done, epochs = state["step"], config.train.epochs
    if steps and (done > epochs * steps or (done == epochs * steps and not state["epoch_open"])):
        raise DataError(
            f"{_KEY}: {source} has trained {done / steps:g} epochs already, and train.epochs is {epochs}",
            f"--train.epochs {-(-done // steps) + 1} or more, which counts all epochs; or start from its weights: "
            f"--{_KEY} null --model.init_from {source}",
        )
    context.extension = state
    context.results["stages"]["train"] = {"extends": str(source), "began_at_step": done}
    context.progress.say(f"train: goes on from {source} after step {done} (epoch {done / max(steps, 1):g})")


def _read(source: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Returns name and content of a run's newest checkpoint, and the state of its training."""
    folder = CheckpointFolder(RunDir(source).checkpoints)
    weights = f"--{_KEY} null --model.init_from {source}"
    try:
        name, newest = folder.load_newest()
        if name is None:
            raise DataError(f"{_KEY}: {source} has saved no checkpoint yet", "wait until it has saved one")
        finished = newest["finished_stages"]
        if "train" not in finished:
            if newest["stage"] != "train":
                raise DataError(f"{_KEY}: {source} is in {newest['stage']}, without train before", "name another run")
            return name, newest, newest["payload"]
        state = folder.load(finished["train"])["payload"].get(TRAINING)
    except (CheckpointError, RunDirError) as error:
        raise DataError(f"{_KEY}: {error.message}", error.hint) from error
    if state is None:
        raise DataError(
            f"{_KEY}: {source} has finished `train` without keeping the optimizer's state (checkpoint.keep.training)",
            f"start from its weights: {weights}",
        )
    return name, newest, state


def _require_same(context: Context, source: Path, record: dict[str, Any]) -> None:
    data = context.data
    same = record["data"] == data.splits.fingerprint and record.get("row_weights", "") == data.weights_sha256
    for split, state in record.get("content", {}).items():
        differing = data.content[split].differing(Content.from_state(state))
        # An item that is another one whenever it is read says nothing.
        random = [is_random(getattr(data.splits, split), differing)] if differing else []
        same = same and (not differing or any(context.world.gather(random[0])))
    if not same:
        raise DataError(
            f"{_KEY}: the data are not those of {source}, or their weights",
            f"give the same data; or start from its weights: --{_KEY} null --model.init_from {source}",
        )
    models = {name: each for name, each in record["same_model"]["models"].items() if name == FLOAT}
    try:
        context.same_model.restore({**record["same_model"], "models": models})
    except RunDirError as error:
        raise DataError(f"{_KEY}: of {source}: {error.message}", "give the same model") from error
