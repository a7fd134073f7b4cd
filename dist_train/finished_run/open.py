"""Opens a run directory: the settings, and the products of finished stages."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dist_train.config.checks.strategy import Precision
from dist_train.config.load import load
from dist_train.config.tree import Config
from dist_train.data.splits import describe_data
from dist_train.distributed.world import World
from dist_train.errors import ConfigError, DataError, RunDirError
from dist_train.models.half_precision import Dtype
from dist_train.pipeline.set_up import Session, open_session
from dist_train.programs.program import Program
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.paths import RunDir
from dist_train.run_dir.record import config_text, engine_of, recorded_config, recorded_environment
from dist_train.stages.context import Context


@dataclass(frozen=True)
class FinishedRun:
    """A run read from its directory.

    Attributes:
        paths: paths of the run directory.
        config: settings of the run, without the ones that only its start needed (weights, trackers).
        described: description of its data, by `describe_data`.
        results: results in its newest checkpoint.
        stages: maps each finished stage to the name of its checkpoint.
    """

    paths: RunDir
    config: Config
    described: dict[str, Any]
    results: dict[str, Any]
    stages: dict[str, str]

    def product(self, stage: str) -> dict[str, Any]:
        """Loads the product of a finished stage."""
        product: dict[str, Any] = CheckpointFolder(self.paths.checkpoints).load(self.stages[stage])["payload"]
        return product

    @property
    def half(self) -> Dtype | None:
        """Dtype of the half model; None if the run has none."""
        dtype: Dtype | None = self.product("half")["dtype"] if "half" in self.stages else None
        return dtype

    @property
    def threads(self) -> int:
        """Number of CPU threads of each rank."""
        recorded = recorded_environment(self.paths).get("threads_per_rank")
        if recorded is None:
            lost = f"{self.paths.environment} is lost or damaged, and the checkpoints hold no copy"
            raise RunDirError(lost, "the same dist-train run command writes it again")
        return int(recorded)

    @property
    def precision(self) -> Precision | None:
        """Precision of the run; None if it was not recorded."""
        recorded: Precision | None = recorded_environment(self.paths).get("precision")
        return recorded

    def session(self, world: World, show: bool) -> Session:
        """Opens a session with threads, precision and engine of the run. Collective.

        show: True if rank 0 prints progress.
        """
        engine = engine_of(recorded_environment(self.paths))
        return open_session(
            self.config, self.paths, world, threads=self.threads, precision=self.precision, engine=engine, show=show
        )

    def load_float(self, model: nn.Module) -> None:
        """Loads the trained weights into `model`, if the run trained any, and sets eval mode."""
        if "train" in self.stages:
            model.load_state_dict(self.product("train")["model"])
        model.eval()

    def int8_program(self) -> Program:
        """Loads the converted program."""
        return Program(**self.product("convert")["program"])


def reopen(run_dir: Path, overrides: Sequence[str] = ()) -> FinishedRun:
    """Opens a run that has a model; writes nothing.

    overrides: options as on the command line; `--data.name` drops the recorded `data.args` and `data.root`.

    Raises:
        RunDirError: there is no run, it has no trained model yet, or this version cannot read it.
        ConfigError: the overrides have mistakes, or data is missing.
    """
    paths = RunDir(Path(run_dir))
    recorded = recorded_config(paths)
    folder = CheckpointFolder(paths.checkpoints)
    newest = folder.load_newest()[1] or {"finished_stages": {}}
    finished = newest["finished_stages"]
    if not {"train", "half", "convert"} & set(finished):
        raise RunDirError(
            f"{run_dir} has no trained model yet", "finish the run first: the same dist-train run command resumes it"
        )
    # Settings that only the run itself needs must not cause errors on another machine.
    settled = ["--trackers", "[]", "--export.formats", "[pt2]"]
    if "train" in finished:
        settled += ["--model.weights", "null", "--model.init_from", "null"]
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    if recorded.get("strategy") == "ft" or (recorded.get("strategy") == "single" and several):
        settled += ["--strategy", "auto"]
    given = {option.partition("=")[0] for option in overrides}
    if given:
        settled += ["--export.input", "float"]  # other data may be no pixels, and nothing is exported with it
    if "--data.name" in given:
        settled += [word for key in ("args", "root") if f"--data.{key}" not in given for word in _dropped(key)]
    try:
        config = _load_settings(paths, [*settled, *overrides])
    except ConfigError as error:
        unknown = [each for each in error.problems if "unknown" in each.message and not each.source.startswith("--")]
        if not unknown:
            raise
        raise RunDirError(
            f"{paths.config} does not fit this version or the registered names: {unknown[0].message}",
            "if the run used your own code, add --import MODULE",
        ) from error
    return FinishedRun(paths, config, newest["described"], newest["results"], finished)


def _load_settings(paths: RunDir, options: Sequence[str]) -> Config:
    """Loads config.yaml with options; from its copy in the checkpoints where it is not as that."""
    text = config_text(paths).encode()
    if paths.config.is_file() and paths.config.read_bytes() == text:
        return load(paths.config, options).config
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / paths.config.name
        copy.write_bytes(text)
        return load(copy, options).config


def _dropped(key: str) -> tuple[str, str]:
    return (f"--data.{key}", "{}" if key == "args" else "null")


def described_by(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the data's description, as `describe_data` makes it, from an artifact's manifest."""
    only = manifest.get("input") or {}
    return {
        "input_shape": only["shape"][1:] if only else None,
        "inputs": manifest.get("inputs"),
        "dynamic": manifest.get("dynamic", {}),
        "resize": only.get("resize"),
        "mean": manifest["normalization"]["mean"],
        "std": manifest["normalization"]["std"],
        "classes": manifest["classes"],
        "num_outputs": len(manifest["classes"]) or None,
    }


def as_trained(context: Context, described: Mapping[str, Any], whole_shape: bool) -> Context:
    """Returns the context with its data normalised by mean and standard deviation of the model's training data.

    whole_shape: True if the model takes images of one height and width only, like an exported model.

    Raises:
        DataError: the images' shape, the number of classes or their numbers do not fit the model.
    """
    splits = context.data.splits
    if described["input_shape"] is None or described.get("dynamic"):
        _require_same_leaves(describe_data(splits)["inputs"], described["inputs"])
    else:
        shape, known = list(splits.input_shape), list(described["input_shape"])
        if shape != known if whole_shape else shape[:1] != known[:1]:
            raise DataError(
                f"the model takes inputs of shape {known}, but the data has {shape}",
                "give data of that shape: --data.name and --data.args",
            )
    outputs = splits.num_outputs
    if described["num_outputs"] not in (None, outputs):
        raise DataError(
            f"the model has {described['num_outputs']} outputs, but the data needs {outputs}",
            "give data of the same classes, in the same order",
        )
    require_same_numbers(described["classes"], splits.classes)
    splits = dataclasses.replace(splits, mean=tuple(described["mean"]), std=tuple(described["std"]))
    return dataclasses.replace(context, data=dataclasses.replace(context.data, splits=splits))


def require_same_numbers(known: Sequence[str], given: Sequence[str]) -> None:
    """Raises DataError where the model's classes and those of the data are numbers, and others: 0 to 2, and 1 to 3.

    Other names may be another spelling of the same.
    """
    numbers = all(name.isdecimal() for name in (*known, *given))
    if known and given and numbers and list(map(int, known)) != list(map(int, given)):
        sides = [", ".join(names[:5]) + (", ..." if len(names) > 5 else "") for names in (known, given)]
        raise DataError(
            f"the model has the classes {sides[0]}, and the data {sides[1]}",
            "give data of the same classes, in the same order",
        )


def _require_same_leaves(found: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]) -> None:
    """Raises DataError where the data's inputs are not those of the model; names the first that differs."""
    given, taken = ({leaf["name"]: leaf for leaf in leaves} for leaves in (found, known))
    for name in {**taken, **given}:
        if given.get(name) != taken.get(name):
            sides = [
                f"{leaf['dtype']} {['any' if size is None else size for size in leaf['shape']]}" if leaf else "none"
                for leaf in (taken.get(name), given.get(name))
            ]
            raise DataError(
                f"the model takes {name} of the inputs as {sides[0]}, but the data gives {sides[1]}",
                "give data of the same inputs: --data.name and --data.args",
            )
