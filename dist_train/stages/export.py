"""Exports the artifact to deploy, on rank 0; verifies it in a fresh process, and records sizes and latencies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from dist_train import trees
from dist_train.artifact.bundle import Bundle, chosen_models
from dist_train.artifact.deployable import Deployable, deploy_float, deploy_half, deploy_int8, simulation
from dist_train.artifact.export import ExportJob, export_models
from dist_train.artifact.pixel_input import PixelInput, pixel_input
from dist_train.config.stages import ExportConfig
from dist_train.errors import ArtifactError
from dist_train.lowering import LoweringUnavailable
from dist_train.lowering.autoselect import slower_than_float
from dist_train.lowering.comparison import drawn_from, time_models
from dist_train.programs.signature import dynamic_of
from dist_train.run_dir.gates import Gate
from dist_train.stages.base import Stage
from dist_train.stages.context import Context
from dist_train.stages.convert import Converted
from dist_train.stages.int8_evaluation import agreement_bound, format_decisions
from dist_train.trees import Tree


class Export(Stage):
    """Writes `export/` and measures its models."""

    settings: ExportConfig

    def run(self, context: Context) -> dict[str, Any]:
        context.progress.say(f"{self.name}: rank 0 writes and verifies {context.run_dir.export}")
        measured = context.world.on_rank_0(lambda: self._export(context), "exporting", self.settings.deadline, "export")
        for name, figures in measured["models"].items():
            context.results["models"].setdefault(name, {}).update(figures)
        self._gate_size(context, measured["fp32_bytes"])
        for gate in measured["gates"]:
            context.gates.check(Gate(**gate))
        return {}

    def _gate_size(self, context: Context, fp32_bytes: int) -> None:
        """Checks int8's size against `export.size_bound`; warns if int8 is not smaller than FP32.

        fp32_bytes: size of the float model's parameters and buffers, without a program.
        """
        int8, bound = context.results["models"].get("int8", {}).get("bytes"), self.settings.size_bound
        if int8 is None:
            return
        if bound is not None:
            hint = "let qat.rules leave less in floating point, or loosen --export.size_bound"
            share = int8 / fp32_bytes
            context.gates.check(Gate(name="size", value=share, bound=bound, passed=share <= bound, hint=hint))
        float_program = context.results["models"].get("fp32", {}).get("bytes", fp32_bytes)
        if int8 >= float_program:
            context.progress.warn(
                f"{self.name}: int8 is not smaller than FP32: {int8:,} bytes against {float_program:,}, "
                "because most of it is the program's fixed part, or layers that stay in floating point"
            )

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        return

    def _export(self, context: Context) -> dict[str, Any]:
        """Exports, sizes and times the models; returns figures and gates, JSON-serializable. On rank 0."""
        products = context.products
        converted = Converted.of(products["convert"]) if "convert" in products else None
        half = products["half"]["dtype"] if "half" in products else None
        probe = context.data.probe_inputs() if converted is None else converted.probe["inputs"]
        names = chosen_models(self.settings.models, half, converted is not None)
        pixels = pixel_input(context.data.described, self.settings.input)
        deployables = _deployables(context, converted, half, probe, names, pixels)
        probe = probe if pixels is None else pixels.pixels(probe)
        job = ExportJob(
            folder=context.run_dir.export,
            formats=self.settings.formats,
            probe=probe,
            task=context.task,
            task_name=context.config.task.name,
            described=context.data.described,
            results=context.results,
            ranges_sha256=None if converted is None else converted.ranges_sha256,
            settings=self.settings,
            agreement_bound=agreement_bound(context),
            seed=context.config.run.seed,
            threads=context.threads,
            say=lambda line: context.progress.say(f"{self.name}: {line}"),
        )
        if "auto" in self.settings.formats:
            job.say(f"trying the runtimes for {', '.join(names)}")
        exported = export_models(job, Bundle(names[0]), {name: deployables[name] for name in names}, deployables)
        figures: dict[str, dict[str, Any]] = {
            name: {"bytes": len(deployable.program.data)} for name, deployable in deployables.items()
        }
        for name, table in exported.runtimes.items():
            figures[name]["runtimes"] = table
        if exported.written and self.settings.latency:
            self._time(context, deployables, probe, figures)
        return {
            "models": figures,
            "gates": [dataclasses.asdict(gate) for gate in exported.gates],
            "fp32_bytes": sum(tensor.nbytes for tensor in context.model.state_dict().values()),
        }

    def _time(
        self, context: Context, deployables: dict[str, Deployable], probe: Tree, figures: dict[str, dict[str, Any]]
    ) -> None:
        """Times every model and adds `latency_ms` and `runtime` to its figures."""
        images = drawn_from(probe, context.config.run.seed)
        timed = {name: each for name, each in deployables.items() if not each.simulated_bits}
        for name in deployables.keys() - timed.keys():
            context.progress.say(f"{self.name}: {name} is not timed: {simulation(deployables[name].simulated_bits)}")
        try:
            times, runtimes = time_models(timed, images, self.settings.latency_batch_sizes, context.threads)
        except LoweringUnavailable as reason:
            context.progress.say(f"{self.name}: {reason}")
            return
        for name in timed:
            figures[name] |= {"latency_ms": times[name], "runtime": runtimes[name]}
        if runtimes.get("int8") == runtimes.get("fp32"):
            for line in slower_than_float(times, runtimes.get("int8", "")):
                context.progress.say(f"{self.name}: {line}")


def _deployables(
    context: Context,
    converted: Converted | None,
    half: str | None,
    probe: Tree,
    exported: Sequence[str],
    pixels: PixelInput | None,
) -> dict[str, Deployable]:
    """Returns all models of the run. Models that are not exported are sized and timed as well, if possible.

    probe: normalized, also where the models are to take pixels.
    """
    float_model, models, dynamic = context.float_copy(), {}, dynamic_of(context.data.described)
    makers: dict[str, Callable[[], Deployable]] = {"fp32": lambda: deploy_float(float_model, probe, pixels, dynamic)}
    if half is not None:
        makers[half] = lambda: deploy_half(float_model, half, probe, pixels, dynamic)
    if converted is not None:
        makers["int8"] = lambda: _int8(context, converted, pixels)
    for name, make in makers.items():
        try:
            models[name] = make()
        except ArtifactError as error:
            if name in exported:
                raise
            context.progress.say(f"export: {name} is neither sized nor timed: {error.message}")
    return models


def _int8(context: Context, converted: Converted, pixels: PixelInput | None) -> Deployable:
    bits = context.config.qat.simulated_bits
    names = [name for name, _ in trees.named_leaves(converted.probe["inputs"])]
    dynamic = dynamic_of(context.data.described)
    deployable = deploy_int8(converted.program, converted.probe["outputs"], bits, pixels, names, dynamic)
    return dataclasses.replace(deployable, decisions=format_decisions(context, deployable))
