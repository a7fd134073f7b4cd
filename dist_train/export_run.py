"""Export after the fact: further models and formats of a finished run, from its config.yaml and checkpoints alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train import registry
from dist_train.artifact_store import read_artifact, write_artifact
from dist_train.artifact_verify import verify_in_fresh_process
from dist_train.assembly import configure_torch
from dist_train.config_fit import simulated_bits
from dist_train.deployment import (
    Bundle,
    Deployable,
    chosen_models,
    deploy_float,
    deploy_half,
    deploy_int8,
    manifest,
    simulation,
)
from dist_train.errors import GateError, RunDirError
from dist_train.lowering.choice import choose_format
from dist_train.lowering.comparison import Candidate, drawn_from
from dist_train.models.build import build_model
from dist_train.reopen import FinishedRun, reopen
from dist_train.run_dir import read_json, replace_json
from dist_train.tasks import Task

_PROBE_ROWS = 16


def export_run(run_dir: Path, formats: Sequence[str] = ("pt2",), model: str | None = None) -> list[str]:
    """Adds a model in these formats to the run's `export/`; needs neither the data nor the run's device.

    formats: pt2 (the program itself, TorchScript for some backends), onnx, openvino, executorch; auto: the fastest here, of those
        installed, by the table that goes into the run's results.json.
    model: fp32, half or int8; None: the artifact's default, or int8, half, fp32, whichever the run has first.

    Returns a line for the user for each thing written; the older artifact is replaced whole.

    Raises:
        RunDirError: there is no such run, or it has not got that model.
        ArtifactError: the model and the format do not go together, or what was written answers differently.
        GateError: the program answers differently in a fresh process.
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
    table: list[dict[str, Any]] | None = None
    for each in wanted:
        if each == "auto" and deployable.simulated_bits:
            lines.append(f"{name}: no format but the program: {simulation(deployable.simulated_bits)}")
        elif each == "auto":
            float_model, settings = _float_model(run), run.config.export
            candidates = {"fp32": Candidate(float_model, float_model), name: deployable.candidate}
            images, sizes = drawn_from(probe, run.config.run.seed), settings.latency_batch_sizes
            task: Task = registry.tasks.get(run.config.task.name)(run.described["num_outputs"], run.config.task.args)
            bound = run.config.convert.agreement_bound
            choice = choose_format(name, candidates, probe, images, sizes, run.threads, task, bound)
            lines += bundle.add_choice(deployable, choice, probe, run.threads)
            table = choice.rows()
        else:
            lines.append(bundle.add_format(deployable, each, probe, run.threads))
    ranges = run.product("convert")["ranges_sha256"] if "convert" in run.stages else None
    content = manifest(bundle, run.described, run.config.task.name, run.results, ranges)
    # Proved before it takes the place of an artifact that may be in use.
    with tempfile.TemporaryDirectory(prefix="dist_train-") as beside:
        trial = Path(beside) / "export"
        write_artifact(trial, bundle.files, content)
        settings = run.config.export
        difference = verify_in_fresh_process(trial, probe, {name: deployable.outputs}, settings.deadline)[name]
    if not difference <= settings.artifact_bound:
        raise GateError(
            f"{name} was not exported: in a fresh process it differs by {difference:.6g}, bound {settings.artifact_bound:g}",
            "report this with the model's name",
        )
    write_artifact(folder, bundle.files, content)
    if table is not None:
        results = read_json(run.paths.results)
        results["models"].setdefault(name, {})["runtimes"] = table
        replace_json(run.paths.results, results)
    return lines


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
