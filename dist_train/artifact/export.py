"""Export of models: adds programs and formats to a bundle, judges and verifies them, and writes the artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.artifact.bundle import Bundle, manifest
from dist_train.artifact.deployable import Deployable, simulation
from dist_train.artifact.load import POSTPROCESS
from dist_train.artifact.store import write_artifact
from dist_train.artifact.verify import Differences, prove
from dist_train.config.stages import ExportConfig
from dist_train.errors import ArtifactError
from dist_train.lowering import LoweringUnavailable
from dist_train.lowering.agreement import Decisions
from dist_train.lowering.autoselect import choose_format
from dist_train.lowering.base import Reference
from dist_train.lowering.boxes import boxes_onnx
from dist_train.lowering.comparison import LARGEST_DIFFERENCE, drawn_from, largest
from dist_train.programs.signature import dynamic_of, leaves_of
from dist_train.run_dir.gates import Gate
from dist_train.tasks import Task
from dist_train.tasks.detector import Detector
from dist_train.trees import Tree

BOXES_FILE = "boxes.onnx"


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """An export of one or several models of a run.

    Attributes:
        folder: of the artifact, which is written whole or not at all.
        formats: pt2 is the program itself, auto the fastest format on this machine.
        probe: inputs [rows, ...] for which every program and file must give the outputs of the model in memory.
        described: the data, from `describe_data`.
        results: of the run, for the manifest.
        ranges_sha256: digest of the ranges of its int8 model; None without one.
        agreement_bound: the smallest share of equal decisions for a runtime of `auto`.
        say: takes a line for the user.
    """

    folder: Path
    formats: Sequence[str]
    probe: Tree
    task: Task
    task_name: str
    described: Mapping[str, Any]
    results: Mapping[str, Any]
    ranges_sha256: str | None
    settings: ExportConfig
    agreement_bound: float
    seed: int
    threads: int
    say: Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """The outcome of an export.

    Attributes:
        gates: in the order in which they were measured; the artifact was written where all hold.
        runtimes: the tables of `auto`, by model.
    """

    gates: list[Gate]
    runtimes: dict[str, list[dict[str, Any]]]

    @property
    def written(self) -> bool:
        return all(gate.holds for gate in self.gates)


def export_models(
    job: ExportJob, bundle: Bundle, models: Mapping[str, Deployable], references: Mapping[str, Reference]
) -> Exported:
    """Exports `models` by name in the job's formats, in one process, on the CPU.

    references: what `auto` times, by name; these models and the float one.

    Raises:
        ArtifactError: a model and a format do not go together, or what was written answers differently here.
    """
    tables = {}
    for name, model in models.items():
        bundle.add(model)
        for each in dict.fromkeys(job.formats):
            if each == "auto":
                tables[name] = _add_fastest(job, bundle, model, references)
            elif each != "pt2":
                job.say(bundle.add_format(model, each, job.probe, job.threads))
    gates = [trial.gate() for trial in bundle.judged]
    if all(gate.holds for gate in gates):
        leaves = leaves_of(job.probe, dynamic_of(job.described))
        outputs = next(iter(models.values())).output_names
        dtype = leaves[0].dtype
        boxes = _boxes(job, bundle, next(iter(models.values())).outputs)
        content = manifest(bundle, job.described, job.task_name, job.results, job.ranges_sha256, dtype, leaves, outputs)
        content |= {**job.task.described(), **boxes}
        expected = {name: model.outputs for name, model in models.items()}
        found = prove(bundle.files, content, job.probe, expected, bundle.answers, job.settings.deadline)
        gates += _proof_gates(found, job.settings.artifact_bound)
        if all(gate.holds for gate in gates):
            write_artifact(job.folder, bundle.files, content)
    return Exported(gates, tables)


def _boxes(job: ExportJob, bundle: Bundle, outputs: Tree) -> dict[str, Any]:
    """Returns the manifest's `postprocess`, where the job asks for it, and adds its file beside ONNX models."""
    if not job.settings.postprocess:
        return {}
    described = job.task.described()
    if "detector" not in described:
        raise ArtifactError(
            f"the task {job.task_name} describes no detector, of whose outputs boxes could be made",
            "--export.postprocess false",
        )
    if not any("onnx" in model.get("formats", {}) for model in bundle.models.values()):
        return {POSTPROCESS: {}}
    try:
        bundle.files[BOXES_FILE] = boxes_onnx(Detector.of_json(described["detector"]), outputs)
    except LoweringUnavailable as error:
        raise ArtifactError(str(error), "--export.postprocess false, or without onnx in export.formats") from error
    job.say(f"boxes of the ONNX models' outputs, for one image: {BOXES_FILE}")
    return {POSTPROCESS: {"onnx": BOXES_FILE}}


def _add_fastest(
    job: ExportJob, bundle: Bundle, model: Deployable, references: Mapping[str, Reference]
) -> list[dict[str, Any]]:
    """Adds the format that `auto` chooses; returns the table of all runtimes."""
    if model.simulated_bits:
        job.say(f"{model.name}: no format but the program: {simulation(model.simulated_bits)}")
        return []
    images, sizes = drawn_from(job.probe, job.seed), job.settings.latency_batch_sizes
    few = Decisions(model.call, job.task, [job.probe], job.agreement_bound)
    decisions = model.decisions or few
    choice = choose_format(model.name, references, job.probe, images, sizes, job.threads, decisions)
    for line in bundle.add_choice(model, choice, job.probe):
        job.say(line)
    return choice.rows()


def _proof_gates(found: Differences, bound: float) -> list[Gate]:
    """Returns the gates of a fresh process: of the programs, absolute, and of the formats' files, relative."""
    programs = largest(found.models.values())
    gates = [
        Gate(
            name="artifact",
            value=programs,
            bound=bound,
            passed=programs <= bound,
            hint="a model does not compute in a fresh process what it computes in memory; nothing was written: "
            "report this with the model's name",
        )
    ]
    if found.formats:
        files = largest(found.formats.values())
        lines = [
            f"\n  {model} as {name}: differs by {difference:.2g} of the largest output"
            for (model, name), difference in found.formats.items()
        ]
        gates.append(
            Gate(
                name="artifact_formats",
                value=files,
                bound=LARGEST_DIFFERENCE,
                passed=files <= LARGEST_DIFFERENCE,
                hint="a file does not answer in a fresh process as it did when it was written; nothing was written: "
                "take another format",
                detail="".join(lines),
            )
        )
    return gates
