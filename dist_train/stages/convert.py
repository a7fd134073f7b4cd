"""Conversion to int8: by rank 0 alone, on a CPU copy; then evaluated by all ranks."""

from __future__ import annotations

from typing import Any

import torch

from dist_train.artifact import load_program, program_bytes
from dist_train.config import ConvertConfig
from dist_train.evaluate import agreement, evaluate
from dist_train.quantization.pt2e import export_converted
from dist_train.quantization.ranges import Ranges
from dist_train.stages.base import Context, Stage


class Convert(Stage):
    """Makes the int8 program, evaluates it exactly, and compares its decisions with the fake-quantized model's."""

    settings: ConvertConfig

    def run(self, context: Context) -> dict[str, Any]:
        world, prepared = context.world, context.prepared()
        made: list[bytes] = []
        probe: dict[str, torch.Tensor] = {}

        def convert() -> None:
            converted = context.backend.convert(prepared.eval())
            # What the artifact must answer is asked of the model in memory, before it is serialised.
            probe["inputs"] = context.probe_inputs()
            with torch.no_grad():
                probe["outputs"] = converted(probe["inputs"])
            made.append(program_bytes(export_converted(converted, context.example(2))))

        context.progress.say(f"{self.name}: rank 0 converts to int8")
        world.on_rank_0(convert, "converting to int8", self.settings.deadline)
        program = world.broadcast_bytes(made[0] if made else None)
        int8 = load_program(program).module()

        def call(inputs: torch.Tensor) -> torch.Tensor:
            # Whatever the device of training, the integer model runs on the CPU.
            outputs: torch.Tensor = int8(inputs.cpu().contiguous())
            return outputs.to(world.device)

        converted_evaluation = evaluate(call, context.evaluation_batches(), context.task, world)
        prepared.observe(False)
        prepared_evaluation = evaluate(prepared.eval(), context.evaluation_batches(), context.task, world)
        context.results["models"]["int8"] = dict(converted_evaluation.metrics)
        agreed = agreement(converted_evaluation, prepared_evaluation, world)
        bound = self.settings.agreement_bound
        context.gate(
            "convert",
            agreed,
            bound,
            agreed >= bound,
            "int8 and fake-quantized model differ: train qat longer, or loosen --convert.agreement_bound and run again",
        )
        return {"program": program, "ranges_sha256": Ranges(prepared).digest(), "probe": probe}

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        context.program = product["program"]
        context.ranges_sha256 = product["ranges_sha256"]
        context.probe = product["probe"]
