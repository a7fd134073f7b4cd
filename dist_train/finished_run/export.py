"""Exports further models and formats of a finished run, from its config.yaml and checkpoints.

Only formats of int8 need data: they are checked on the run's evaluation set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from dist_train import registry
from dist_train.artifact.bundle import Bundle, chosen_models
from dist_train.artifact.deployable import Deployable
from dist_train.artifact.export import Exported, ExportJob, export_models
from dist_train.artifact.store import read_artifact
from dist_train.distributed.process_group import join
from dist_train.errors import ConfigError, DataError, GateError, RunDirError
from dist_train.finished_run.models import deployable, has_drawn_rows, input_of, kept_rows, tell_task, trained_model
from dist_train.finished_run.open import FinishedRun, as_trained, reopen
from dist_train.lowering.base import Reference
from dist_train.programs.program import tree_call
from dist_train.run_dir.files import read_json, replace_json
from dist_train.stages.context import Context
from dist_train.stages.convert import Converted
from dist_train.stages.int8_evaluation import format_decisions
from dist_train.tasks import Task


def export_run(run_dir: Path, formats: Sequence[str] = ("pt2",), model: str | None = None) -> list[str]:
    """Adds a model in these formats to the run's `export/`; returns a line to print for each file written.

    It does not need the run's device, and needs the data for formats of int8 only. The older artifact is replaced as a
    whole.

    Args:
        formats: pt2 (the program itself, TorchScript for some backends), onnx, openvino, executorch; auto: the fastest
            of the installed ones on this machine, by the table that is added to results.json.
        model: fp32, half or int8; None: the artifact's default, else the first of int8, half, fp32 that the run has.

    Raises:
        RunDirError: there is no such run, or it does not have that model.
        ArtifactError: the format does not support the model, or the written file gives other outputs.
        GateError: int8 disagrees in a format's runtime; or a program or file gives other outputs in a fresh process.
        DataError: the evaluation set, which checks formats of int8, cannot be read.
        SetupError: a package is missing.
    """
    run = reopen(run_dir)
    wanted = [each for each in dict.fromkeys(formats) if each != "pt2"]
    for each in wanted:
        if each != "auto":
            registry.export_formats.get(each)  # reports a missing package before any work is done
    torch.set_num_threads(run.threads)
    folder, settings = run.paths.export, run.config
    kept, files = read_artifact(folder) if folder.is_dir() else ({}, {})
    name = _name(run, model or kept.get("default"))
    converted = Converted.of(run.product("convert")) if "convert" in run.stages else None
    float_model = trained_model(run) if name != "int8" or "auto" in wanted else None
    pixels = input_of(run, kept)
    real = None if has_drawn_rows(run) else kept_rows(run)
    if real is None and not has_drawn_rows(run):
        with _data(run, "inputs that are no single tensor of floats are tried on rows of the data") as context:
            real = context.data.probe_inputs()
    model_to_write, probe = deployable(run, name, float_model, pixels, real)
    if name == "int8" and wanted and model_to_write.source is not None and not model_to_write.simulated_bits:
        model_to_write = _judged(run, model_to_write)
    lines: list[str] = []
    task: Task = registry.tasks.get(settings.task.name)(run.described["num_outputs"], settings.task.args)
    tell_task(run, task, float_model, real if not has_drawn_rows(run) else None)
    job = ExportJob(
        folder=folder,
        formats=wanted,
        probe=probe,
        task=task,
        task_name=settings.task.name,
        described=run.described,
        results=run.results,
        ranges_sha256=None if converted is None else converted.ranges_sha256,
        settings=settings.export,
        agreement_bound=settings.convert.agreement_bound,
        seed=settings.run.seed,
        threads=run.threads,
        say=lines.append,
    )
    fp32 = float_model if float_model is None or pixels is None else pixels.before(float_model)
    dynamic = model_to_write.dynamic
    references = {} if fp32 is None else {"fp32": Reference(call=tree_call(fp32), source=fp32, dynamic=dynamic)}
    bundle = Bundle(kept.get("default", name), kept.get("models"), files)
    exported = export_models(job, bundle, {name: model_to_write}, {**references, name: model_to_write})
    try:
        for gate in exported.gates:
            gate.require()
    except GateError as error:
        raise GateError(error.message, f"{error.hint}; {folder} is unchanged") from None
    _record(run, name, exported)
    return [f"{name}: {bundle.models[name]['file']}", *lines]


def _judged(run: FinishedRun, int8: Deployable) -> Deployable:
    """Returns the int8 model with its decisions on the run's evaluation set, which its formats must match.

    Raises:
        DataError: the evaluation set cannot be read here.
    """
    with _data(run, "formats of int8 are checked on the run's evaluation set") as context:
        return dataclasses.replace(int8, decisions=format_decisions(context, int8))


@contextmanager
def _data(run: FinishedRun, why: str) -> Iterator[Context]:
    """Opens the run's data.

    Raises:
        DataError: it cannot be read here; `why` says what it is for.
    """
    with join(run.config.run) as world:
        session = run.session(world, show=False)
        try:
            context = session.build()
        except (ConfigError, DataError) as error:
            raise DataError(
                f"{why}, which cannot be read here: {error.message}",
                error.hint or "export them on a machine with the data; or --model fp32",
            ) from error
        yield as_trained(context, run.described, whole_shape=True)


def _record(run: FinishedRun, name: str, exported: Exported) -> None:
    """Adds the gates of the formats and the tables of `auto` to the run's results.json."""
    results = read_json(run.paths.results)
    for model, table in exported.runtimes.items():
        results["models"].setdefault(model, {})["runtimes"] = table
    formats = [gate for gate in exported.gates if gate.runtime]
    results["gates"] |= {gate.name: gate.record() for gate in formats}
    if exported.runtimes or formats:
        replace_json(run.paths.results, results)


def _name(run: FinishedRun, wanted: str | None) -> str:
    (name,) = chosen_models(None if wanted is None else [wanted], run.half, "convert" in run.stages)
    has = {"int8": "convert" in run.stages, "half": False}.get(name, name in ("fp32", run.half))
    if not has:
        hint = "run it with `convert` among its stages" if name == "int8" else "run it with `half` among its stages"
        raise RunDirError(f"{run.paths.path} has no model {name!r}", f"{hint}; or --model fp32")
    return name
