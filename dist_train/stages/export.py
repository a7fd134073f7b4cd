"""Export: the artifact that is deployed, verified in a fresh process, sized and timed; by rank 0 alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from dist_train.artifact import load_program, program_bytes, verify_in_fresh_process, write_artifact
from dist_train.config import ExportConfig
from dist_train.data.loader import EvaluationLoader
from dist_train.lowering import LoweringUnavailable, compare_latency, lower
from dist_train.stages.base import Context, Stage


class Export(Stage):
    """Writes `export/` and measures it."""

    settings: ExportConfig

    def run(self, context: Context) -> dict[str, Any]:
        context.progress.say(f"{self.name}: rank 0 writes and verifies {context.run_dir.export}")
        measured = context.world.on_rank_0(lambda: self._export(context), "exporting", self.settings.deadline)
        for name, figures in measured["models"].items():
            context.results["models"].setdefault(name, {}).update(figures)
        difference, bound = measured["difference"], self.settings.artifact_bound
        context.gate("artifact", difference, bound, difference <= bound, "the artifact does not compute what the converted model does in a fresh process")
        return {}

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        return

    def _export(self, context: Context) -> dict[str, Any]:
        assert context.program is not None
        write_artifact(context.run_dir.export, context.program, manifest(context))
        inputs = next(iter(EvaluationLoader(context.source(context.splits.eval, 0), 16, 1, 0, 16))).inputs.cpu().contiguous()
        program = load_program(context.program)
        with torch.no_grad():
            expected = program.module()(inputs)
        difference = verify_in_fresh_process(context.run_dir.export, inputs, expected, self.settings.deadline)
        float_model = context.float_copy()
        figures: dict[str, dict[str, Any]] = {
            "fp32": {"bytes": len(program_bytes(export_float(float_model, context.example(2))))},
            "int8": {"bytes": len(context.program)},
        }
        if self.settings.latency:
            self._time(context, float_model, program, figures)
        return {"models": figures, "difference": difference}

    def _time(self, context: Context, float_model: nn.Module, program: ExportedProgram, figures: dict[str, dict[str, Any]]) -> None:
        example = context.example(2)
        try:
            lowered = {"fp32": lower(float_model, example, context.threads), "int8": lower(program, example, context.threads)}
        except LoweringUnavailable as reason:
            context.progress.say(f"{self.name}: {reason}")
            return
        generator = torch.Generator().manual_seed(context.config.run.seed)
        times = compare_latency(
            {name: each.call for name, each in lowered.items()},
            lambda rows: torch.randn(rows, *context.splits.input_shape, generator=generator),
            self.settings.latency_batch_sizes,
        )
        for name, each in lowered.items():
            figures[name] |= {"latency_ms": times[name], "runtime": each.name}


def export_float(model: nn.Module, example: torch.Tensor) -> ExportedProgram:
    """The float model as a program whose batch dimension is dynamic; what the int8 program's size is compared with."""
    return torch.export.export(model, (example,), dynamic_shapes=({0: Dim("batch", min=1)},))


def manifest(context: Context) -> dict[str, Any]:
    """What a user of the artifact must know; nothing that differs between a run and its repetition."""
    models = context.results["models"]
    return {
        "input": {"shape": [None, *context.splits.input_shape], "dtype": "float32"},
        "normalization": {"mean": list(context.splits.mean), "std": list(context.splits.std)},
        "classes": list(context.splits.classes),
        "ranges_sha256": context.ranges_sha256,
        "world_sizes": context.results["world_sizes"],
        "metrics": {name: {key: value for key, value in figures.items() if isinstance(value, (int, float)) and key != "bytes"} for name, figures in models.items()},
    }
