"""Evaluates models of a finished run or an artifact, on the run's data or other data, on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train.artifact.load import load_artifact
from dist_train.artifact.pixel_input import pixel_input
from dist_train.artifact.store import verify_artifact
from dist_train.console.results_table import print_results
from dist_train.distributed.process_group import join
from dist_train.errors import RunDirError
from dist_train.finished_run.models import model_names
from dist_train.finished_run.open import FinishedRun, as_trained, described_by, reopen
from dist_train.models.half_precision import HalfModel
from dist_train.programs.program import Call, open_program
from dist_train.stages.context import Context
from dist_train.stages.int8_evaluation import evaluate_int8
from dist_train.training.evaluate import evaluate


def evaluate_run(
    run_dir: Path, model: str | None = None, overrides: Sequence[str] = (), as_json: bool = False
) -> dict[str, Any]:
    """Evaluates models on all ranks; writes no files.

    run_dir: the run that gives the settings: model, task and data.
    model: fp32, half, int8, or the path of an artifact or of a model's file in one; None: all models of the run.
    overrides: settings of the section `data`, as on the command line: `["--data.name", "digits"]`. Images are
        normalised by mean and standard deviation of the training data.
    as_json: rank 0 prints the results as JSON instead of a table.

    Raises:
        RunDirError: there is no run, or it does not have that model.
        DataError: the model does not fit the data.
    """
    run = reopen(run_dir, overrides)
    with join(run.config.run) as world:
        context = run.session(world, show=not as_json).build()
        models = {}
        for name in [model] if model is not None else model_names(run):
            label, metrics = _evaluate(name, run, context)
            models[label] = metrics
        results = {
            "run": run.config.run.name,
            "world_size": world.world_size,
            "data": run.config.data.name,
            "models": models,
            "gates": {},
        }
        if world.is_main:
            if as_json:
                print(json.dumps(results, indent=2))
            else:
                print_results(results)
    return results


def _evaluate(name: str, run: FinishedRun, context: Context) -> tuple[str, dict[str, Any]]:
    """Returns the model's name in the results, and its metrics."""
    if name == "int8" and "convert" in run.stages:
        return name, evaluate_int8(as_trained(context, run.described, whole_shape=True), _int8(run)).metrics
    if name in ("fp32", "half", run.half):
        if name != "fp32" and run.half is None:
            raise RunDirError(f"{run.paths.path} has no half model", "run it with `half` among its stages")
        context = as_trained(context, run.described, whole_shape=False)
        run.load_float(context.model)
        if name == "fp32":
            return name, context.evaluate(context.model).metrics
        assert run.half is not None
        half = HalfModel(context.model, run.half)
        return run.half, evaluate(half, context.data.evaluation_batches(), context.task, context.world).metrics
    if name == "int8" or not Path(name).exists():
        raise RunDirError(
            f"{run.paths.path} has no model {name!r}, and there is no file of that name",
            f"choose one of {', '.join(model_names(run))}; or give the path of an artifact",
        )
    call, manifest = _of_artifact(name)
    return name, evaluate_int8(as_trained(context, described_by(manifest), whole_shape=True), call).metrics


def _of_artifact(path: Path | str, model: str | None = None) -> tuple[Call, dict[str, Any]]:
    """Loads a model as `load_artifact` does, as a function of the inputs that the data's loader gives."""
    call, manifest = load_artifact(path, model, postprocess=False)
    pixels = pixel_input(described_by(manifest), manifest["input"]["dtype"]) if "input" in manifest else None
    return call if pixels is None else lambda inputs: call(pixels.pixels(inputs)), manifest


def _int8(run: FinishedRun) -> Call:
    """Opens the exported int8 model; if there is none, the converted program."""
    if run.paths.export.is_dir() and "int8" in verify_artifact(run.paths.export)["models"]:
        return _of_artifact(run.paths.export, "int8")[0]
    return open_program(run.int8_program())
