"""Export: the artifact that is deployed, verified in a fresh process, sized and timed; by rank 0 alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dist_train.artifact.bundle import Bundle, chosen_models, manifest
from dist_train.artifact.deployable import Deployable, deploy_float, deploy_half, deploy_int8, simulation
from dist_train.artifact.store import write_artifact
from dist_train.artifact.verify import prove
from dist_train.config.stages import ExportConfig, simulated_bits
from dist_train.data.splits import describe_data
from dist_train.errors import ArtifactError
from dist_train.lowering import LoweringUnavailable
from dist_train.lowering.agreement import Decisions
from dist_train.lowering.autoselect import choose_format, slower_than_float
from dist_train.lowering.comparison import LARGEST_DIFFERENCE, drawn_from, time_models
from dist_train.stages.base import Stage
from dist_train.stages.context import Context
from dist_train.stages.int8_evaluation import agreement_bound, format_decisions


class Export(Stage):
    """Writes `export/` and measures it."""

    settings: ExportConfig

    def run(self, context: Context) -> dict[str, Any]:
        context.progress.say(f"{self.name}: rank 0 writes and verifies {context.run_dir.export}")
        measured = context.world.on_rank_0(lambda: self._export(context), "exporting", self.settings.deadline, "export")
        for name, figures in measured["models"].items():
            context.results["models"].setdefault(name, {}).update(figures)
        for gate in measured["formats"]:
            context.gate(**gate)
        self._gate_size(context, measured["fp32_bytes"])
        self._gate_artifact(context, measured["difference"], measured["opened"])
        return {}

    def _gate_artifact(self, context: Context, difference: float, opened: dict[str, float]) -> None:
        """difference: of the programs in a fresh process, absolute. opened: of the formats' files there, relative, by their names."""
        hint = "a model of the artifact does not compute in a fresh process what it computes in memory; nothing was written"
        bound = self.settings.artifact_bound
        context.gate("artifact", difference, bound, difference <= bound, hint)
        if opened:
            worst = float(torch.tensor(list(opened.values())).max())  # NaN where one is
            hint = "a file does not answer in a fresh process as it did when it was written: take another format; nothing was written"
            detail = "".join(
                f"\n  {name}: differs by {each:.2g} of the largest output" for name, each in opened.items()
            )
            context.gate("artifact_formats", worst, LARGEST_DIFFERENCE, _are_rounding(opened), hint, detail)

    def _gate_size(self, context: Context, fp32_bytes: int) -> None:
        """fp32_bytes: of the float model's parameters and buffers, without a program around them."""
        int8, bound = context.results["models"].get("int8", {}).get("bytes"), self.settings.size_bound
        if int8 is not None and bound is not None:
            hint = "leave less in floating point by qat.rules, or loosen --export.size_bound"
            context.gate("size", int8 / fp32_bytes, bound, int8 <= bound * fp32_bytes, hint)
        float_program = context.results["models"].get("fp32", {}).get("bytes", fp32_bytes)
        if int8 is not None and int8 >= float_program:
            context.progress.warn(
                f"{self.name}: int8 is not smaller than FP32: {int8:,} bytes against {float_program:,}, as the fixed part of its program "
                "or what stays in floating point is most of it"
            )

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        return

    def _export(self, context: Context) -> dict[str, Any]:
        probe = context.probe["inputs"] if context.probe else context.probe_inputs()
        names = chosen_models(self.settings.models, context.half, context.program is not None)
        deployables = _deployables(context, probe, names)
        bundle, figures = Bundle(names[0]), dict[str, dict[str, Any]]()
        for name, deployable in deployables.items():
            figures[name] = {"bytes": len(deployable.program.data)}
        for name in names:
            bundle.add(deployables[name])
            for each in dict.fromkeys(self.settings.formats):
                if each == "auto":
                    lines, figures[name]["runtimes"] = self._choose(context, bundle, deployables, name, probe)
                elif each != "pt2":
                    lines = [bundle.add_format(deployables[name], each, probe, context.threads)]
                else:
                    continue
                for line in lines:
                    context.progress.say(f"{self.name}: {line}")
        for judged in bundle.judged:
            context.gate(**judged.gate())  # before anything is written
        ranges = context.ranges_sha256 or None
        described = describe_data(context.splits)
        content = manifest(bundle, described, context.config.task.name, context.results, ranges)
        expected = {name: deployables[name].outputs for name in names}
        found = prove(bundle.files, content, probe, expected, bundle.answers, self.settings.deadline)
        # NaN, which passes no bound, must not be lost among the others.
        worst = float(torch.tensor(list(found.models.values())).max())
        opened = {f"{model} as {name}": each for (model, name), each in found.formats.items()}
        if worst <= self.settings.artifact_bound and _are_rounding(opened):
            write_artifact(context.run_dir.export, bundle.files, content)
            if self.settings.latency:
                self._time(context, deployables, probe, figures)
        state = context.model.state_dict().values()
        return {
            "models": figures,
            "formats": [each.gate() for each in bundle.judged],
            "difference": worst,
            "opened": opened,
            "fp32_bytes": sum(tensor.nbytes for tensor in state),
        }

    def _choose(
        self, context: Context, bundle: Bundle, deployables: dict[str, Deployable], name: str, probe: torch.Tensor
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """`auto`: lines for the user, and the table."""
        if deployables[name].simulated_bits:
            return [f"{name}: no format but the program: {simulation(deployables[name].simulated_bits)}"], []
        sizes, images = self.settings.latency_batch_sizes, drawn_from(probe, context.config.run.seed)
        context.progress.say(f"{self.name}: trying the runtimes for {name}")
        few = Decisions(deployables[name].call, context.task, [probe], agreement_bound(context))
        decisions = deployables[name].decisions or few
        choice = choose_format(name, deployables, probe, images, sizes, context.threads, decisions)
        return bundle.add_choice(deployables[name], choice, probe), choice.rows()

    def _time(
        self,
        context: Context,
        deployables: dict[str, Deployable],
        probe: torch.Tensor,
        figures: dict[str, dict[str, Any]],
    ) -> None:
        images = drawn_from(probe, context.config.run.seed)
        candidates = {name: each for name, each in deployables.items() if not each.simulated_bits}
        for name in deployables.keys() - candidates.keys():
            context.progress.say(f"{self.name}: {name} is not timed: {simulation(deployables[name].simulated_bits)}")
        try:
            times, runtimes = time_models(candidates, images, self.settings.latency_batch_sizes, context.threads)
        except LoweringUnavailable as reason:
            context.progress.say(f"{self.name}: {reason}")
            return
        for name in candidates:
            figures[name] |= {"latency_ms": times[name], "runtime": runtimes[name]}
        if runtimes.get("int8") == runtimes.get("fp32"):
            for line in slower_than_float(times, runtimes.get("int8", "")):
                context.progress.say(f"{self.name}: {line}")


def _are_rounding(opened: dict[str, float]) -> bool:
    """NaN is none."""
    return all(difference <= LARGEST_DIFFERENCE for difference in opened.values())


def _with_decisions(context: Context, deployable: Deployable) -> Deployable:
    return dataclasses.replace(deployable, decisions=format_decisions(context, deployable))


def _deployables(context: Context, probe: torch.Tensor, exported: Sequence[str]) -> dict[str, Deployable]:
    """Every model of the run: those that are not exported are sized and timed beside the others, where they can be."""
    float_model, models = context.float_copy(), {}
    makers: dict[str, Callable[[], Deployable]] = {"fp32": lambda: deploy_float(float_model, probe)}
    if context.half is not None:
        dtype = context.half
        makers[dtype] = lambda: deploy_half(float_model, dtype, probe)
    if context.program is not None:
        program = context.program
        bits = simulated_bits(context.config.qat.rules)
        makers["int8"] = lambda: _with_decisions(context, deploy_int8(program, context.probe["outputs"], bits))
    for name, make in makers.items():
        try:
            models[name] = make()
        except ArtifactError as error:
            if name in exported:
                raise
            context.progress.say(f"export: {name} is neither sized nor timed: {error.message}")
    return models
