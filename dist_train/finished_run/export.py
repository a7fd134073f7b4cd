"""Export after the fact: further models and formats of a finished run, from its config.yaml and checkpoints.

Formats of int8 are judged by the run's evaluation set; the rest needs no data.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train import registry
from dist_train.artifact.bundle import Bundle, chosen_models, manifest
from dist_train.artifact.deployable import Deployable, deploy_float, deploy_half, deploy_int8, simulation
from dist_train.artifact.store import read_artifact, write_artifact
from dist_train.artifact.verify import Differences, prove
from dist_train.config.stages import simulated_bits
from dist_train.console.progress import Progress
from dist_train.distributed.process_group import join
from dist_train.errors import ConfigError, DataError, GateError, RunDirError
from dist_train.finished_run.open import FinishedRun, as_trained, reopen
from dist_train.lowering.agreement import Decisions
from dist_train.lowering.autoselect import choose_format
from dist_train.lowering.base import Reference
from dist_train.lowering.comparison import LARGEST_DIFFERENCE, drawn_from
from dist_train.models.build import build_model
from dist_train.pipeline.auto import choose, look
from dist_train.pipeline.set_up import configure_torch, make_context
from dist_train.run_dir.files import read_json, replace_json
from dist_train.run_dir.ledger import NoLedger
from dist_train.stages.int8_evaluation import format_decisions
from dist_train.tasks import Task
from dist_train.trackers.base import Trackers

_PROBE_ROWS = 16


def export_run(run_dir: Path, formats: Sequence[str] = ("pt2",), model: str | None = None) -> list[str]:
    """Adds a model in these formats to the run's `export/`; needs not the run's device, and the data for formats of int8 alone.

    formats: pt2 (the program itself, TorchScript for some backends), onnx, openvino, executorch; auto: the fastest here, of those
        installed, by the table that goes into the run's results.json.
    model: fp32, half or int8; None: the artifact's default, or int8, half, fp32, whichever the run has first.

    Returns a line for the user for each thing written; the older artifact is replaced whole.

    Raises:
        RunDirError: there is no such run, or it has not got that model.
        ArtifactError: the model and the format do not go together, or what was written answers differently.
        GateError: int8 decides otherwise in a format's runtime; or a program or a file answers differently in a fresh process.
        DataError: the evaluation set by which a format of int8 is judged is not here.
        SetupError: a package is missing.
    """
    run = reopen(run_dir)
    if not run.described:
        raise RunDirError(f"{run_dir} was made by a version that did not record its data", "run it anew")
    wanted = [each for each in dict.fromkeys(formats) if each != "pt2"]
    for each in wanted:
        if each != "auto":
            registry.export_formats.get(each)  # a missing package is found before anything is made
    configure_torch(run.config, run.threads)
    folder = run.paths.export
    kept, files = read_artifact(folder) if folder.is_dir() else ({}, {})
    name = _name(run, model or kept.get("default"))
    bundle = Bundle(kept.get("default", name), kept.get("models"), files)
    deployable, probe = _deployable(run, name)
    bundle.add(deployable)
    lines = [f"{name}: {bundle.models[name]['file']}"]
    with _judged(run, deployable, wanted) as judged:
        table = _add_formats(run, bundle, judged, wanted, probe, lines)
    for format in bundle.judged:
        gate = format.gate()
        if not gate["passed"]:
            message = f"the gate `{gate['name']}` failed in {format.runtime}:{gate['detail']}"
            raise GateError(message, "take another format, or the program itself (pt2); the artifact is as it was")
    ranges = run.product("convert")["ranges_sha256"] if "convert" in run.stages else None
    content = manifest(bundle, run.described, run.config.task.name, run.results, ranges)
    settings = run.config.export
    expected = {name: deployable.outputs}
    found = prove(bundle.files, content, probe, expected, bundle.answers, settings.deadline)
    _require_same(found, name, settings.artifact_bound)
    write_artifact(folder, bundle.files, content)
    _record(run, name, bundle, table)
    return lines


def _add_formats(
    run: FinishedRun,
    bundle: Bundle,
    deployable: Deployable,
    wanted: Sequence[str],
    probe: torch.Tensor,
    lines: list[str],
) -> list[dict[str, Any]] | None:
    """Adds the formats to the bundle and what there is to say of them to the lines; the table of `auto`, None without."""
    table, name = None, deployable.name
    for each in wanted:
        if each == "auto" and deployable.simulated_bits:
            lines.append(f"{name}: no format but the program: {simulation(deployable.simulated_bits)}")
        elif each == "auto":
            float_model, settings = _float_model(run), run.config.export
            candidates = {"fp32": Reference(call=float_model, source=float_model), name: deployable}
            images, sizes = drawn_from(probe, run.config.run.seed), settings.latency_batch_sizes
            task: Task = registry.tasks.get(run.config.task.name)(run.described["num_outputs"], run.config.task.args)
            few = Decisions(deployable.call, task, [probe], run.config.convert.agreement_bound)
            choice = choose_format(name, candidates, probe, images, sizes, run.threads, deployable.decisions or few)
            lines += bundle.add_choice(deployable, choice, probe)
            table = choice.rows()
        else:
            lines.append(bundle.add_format(deployable, each, probe, run.threads))
    return table


@contextmanager
def _judged(run: FinishedRun, deployable: Deployable, wanted: Sequence[str]) -> Iterator[Deployable]:
    """The model with what its formats are judged by; int8 alone needs the data for it."""
    if deployable.name != "int8" or not wanted or deployable.source is None or deployable.simulated_bits:
        yield deployable
        return
    with join(run.config.run) as world:
        progress = Progress(False, run.config.log.interval)
        choices = choose(run.config, look(world, run.threads, threads_kept=True), os.environ, run.precision)
        try:
            context = make_context(
                run.config, run.paths, world, run.threads, progress, Trackers([]), NoLedger(), choices
            )
        except (ConfigError, DataError) as error:
            raise DataError(
                f"formats of int8 are judged by the run's evaluation set, which cannot be read here: {error.message}",
                error.hint or "export them where the data is; or --model fp32",
            ) from error
        context.splits = as_trained(context.splits, run.described, whole_shape=True)
        yield dataclasses.replace(deployable, decisions=format_decisions(context, deployable))


def _require_same(found: Differences, name: str, bound: float) -> None:
    """Raises GateError where the program or a file does not answer in a fresh process as it did here."""
    difference = found.models[name]
    if not difference <= bound:
        raise GateError(
            f"{name} was not exported: in a fresh process it differs by {difference:.6g}, bound {bound:g}",
            "report this with the model's name",
        )
    for (model, format), differs in found.formats.items():
        if not differs <= LARGEST_DIFFERENCE:
            raise GateError(
                f"{model} as {format} was not exported: its file answers differently in a fresh process "
                f"({differs:.2g} of the largest output)",
                "take another format, and report this with the model's name",
            )


def _record(run: FinishedRun, name: str, bundle: Bundle, table: list[dict[str, Any]] | None) -> None:
    """What was measured, in the run's results.json."""
    results = read_json(run.paths.results)
    if table is not None:
        results["models"].setdefault(name, {})["runtimes"] = table
    for each in bundle.judged:
        gate = each.gate()
        kept = ("value", "bound", "passed", "runtime", "samples")
        results["gates"][gate["name"]] = {key: gate[key] for key in kept}
    if table is not None or bundle.judged:
        replace_json(run.paths.results, results)


def _name(run: FinishedRun, wanted: str | None) -> str:
    (name,) = chosen_models(None if wanted is None else [wanted], run.half, "convert" in run.stages)
    has = {"int8": "convert" in run.stages, "half": False}.get(name, name in ("fp32", run.half))
    if not has:
        hint = "run it with `convert` among its stages" if name == "int8" else "run it with `half` among its stages"
        raise RunDirError(f"{run.paths.path} has no model {name!r}", f"{hint}; or --model fp32")
    return name


def _deployable(run: FinishedRun, name: str) -> tuple[Deployable, torch.Tensor]:
    """The model, and the inputs that it is asked: those of the conversion, else drawn, as the data may be elsewhere."""
    if name == "int8":
        probe: dict[str, Any] = run.product("convert")["probe"]
        bits = simulated_bits(run.config.qat.rules)
        return deploy_int8(run.int8_program(), probe["outputs"], bits), probe["inputs"]
    generator = torch.Generator().manual_seed(run.config.run.seed)
    inputs = torch.randn(_PROBE_ROWS, *run.described["input_shape"], generator=generator)
    model = _float_model(run)
    return deploy_float(model, inputs) if name == "fp32" else deploy_half(model, name, inputs), inputs


def _float_model(run: FinishedRun) -> nn.Module:
    settings = run.config.model
    model = build_model(settings, run.described["num_outputs"], run.described["input_shape"][0])
    if settings.channels_last:
        model = model.to(memory_format=torch.channels_last)
    run.load_float(model)
    return model
