"""Conversion to int8: by rank 0 alone, on a CPU copy; then evaluated by all ranks."""

from __future__ import annotations

from typing import Any

import torch

from dist_train.config_fit import ConvertConfig, simulated_bits
from dist_train.evaluate import agreement, evaluate
from dist_train.program import Program, open_program
from dist_train.quantization.ranges import Ranges
from dist_train.stages.base import Stage
from dist_train.stages.context import Context
from dist_train.world import World


class Convert(Stage):
    """Makes the int8 program, evaluates it exactly, and compares its decisions with the fake-quantized model's."""

    settings: ConvertConfig

    def run(self, context: Context) -> dict[str, Any]:
        world, prepared = context.world, context.prepared()
        made: list[Program] = []
        probe: dict[str, torch.Tensor] = {}

        def convert() -> None:
            converted = context.backend.convert(prepared.eval())
            # What the artifact must answer is asked of the model in memory, before it is serialised.
            probe["inputs"] = context.probe_inputs()
            with torch.no_grad():
                probe["outputs"] = converted(probe["inputs"])
            made.append(context.backend.serialize(converted, context.example(2)))

        context.progress.say(f"{self.name}: rank 0 converts to int8")
        world.on_rank_0(convert, "converting to int8", self.settings.deadline, "convert")
        program = _broadcast(made[0] if made else None, world)
        int8 = open_program(program)

        def call(inputs: torch.Tensor) -> torch.Tensor:
            # Whatever the device of training, the integer model runs on the CPU.
            outputs: torch.Tensor = int8(inputs.cpu().contiguous())
            return outputs.to(world.device)

        converted_evaluation = evaluate(call, context.evaluation_batches(), context.task, world)
        prepared.observe(False)
        prepared_evaluation = evaluate(prepared.eval(), context.evaluation_batches(), context.task, world)
        context.results["models"]["int8"] = dict(converted_evaluation.metrics)
        if bits := simulated_bits(context.config.qat.rules):
            context.results["models"]["int8"]["simulated_bits"] = bits
        context.keep_details("int8", converted_evaluation)
        agreed = agreement(converted_evaluation, prepared_evaluation, context.task, world)
        bound = self.settings.agreement_bound
        context.gate(
            "convert",
            agreed,
            bound,
            agreed >= bound,
            "int8 and fake-quantized model differ: train qat longer, or loosen --convert.agreement_bound and run again",
        )
        return {"program": vars(program), "ranges_sha256": Ranges(prepared).digest(), "probe": probe}

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        context.program = Program(**product["program"])
        context.ranges_sha256 = product["ranges_sha256"]
        context.probe = product["probe"]


def _broadcast(program: Program | None, world: World) -> Program:
    """Rank 0's program on every rank; `extra` is for the artifact, which rank 0 writes, and stays there."""
    kind = world.broadcast_bytes(None if program is None else program.kind.encode()).decode()
    data = world.broadcast_bytes(None if program is None else program.data)
    return program or Program(kind, data)  # type: ignore[arg-type]
