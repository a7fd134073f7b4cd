"""Converts to int8 on rank 0, on the CPU; then evaluates int8 on all ranks, in PyTorch and in its runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_train import trees
from dist_train.artifact.deployable import simulation
from dist_train.cluster.instructions import wrong_here
from dist_train.config.stages import ConvertConfig
from dist_train.lowering.base import Lowered
from dist_train.programs.program import Program, open_program
from dist_train.programs.signature import dynamic_of
from dist_train.quantization.int8_share import LEAST_SHARE, advise, int8_share
from dist_train.quantization.layer_sqnr import layer_sqnr, sqnr_as_json, sqnr_table
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from dist_train.run_dir.gates import Gate
from dist_train.stages.base import Stage
from dist_train.stages.context import Context
from dist_train.stages.int8_evaluation import agreement_bound, convert_on_rank_0, judge, open_in_runtime
from dist_train.training.evaluate import evaluate
from dist_train.trees import Tree

_NOISE_ROWS = 8  # few, because the outputs of all layers are held for them


class Convert(Stage):
    """Makes the int8 program, evaluates it exactly, and compares its decisions with the fake-quantized model's."""

    settings: ConvertConfig

    def run(self, context: Context) -> dict[str, Any]:
        prepared = context.prepared()
        probe: dict[str, Tree] = {}

        def inspect(converted: nn.Module) -> dict[str, Any]:
            # The artifact must reproduce these outputs, so they are computed in memory, before serialisation.
            probe["inputs"] = context.data.probe_inputs()
            with torch.no_grad():
                probe["outputs"] = trees.plain(trees.call(converted, probe["inputs"]))
            noise = layer_sqnr(prepared, converted, trees.take(probe["inputs"], slice(_NOISE_ROWS)))
            return {"noise": noise, "weights": count_weights(context, prepared)}

        context.progress.say(f"{self.name}: rank 0 converts to int8")
        program, found = convert_on_rank_0(context, prepared, inspect)
        noise, weights = found["noise"], found["weights"]
        context.results["layer_sqnr_db"] = {layer: sqnr_as_json(ratio) for layer, ratio in noise.items()}
        prepared.observe(False)
        self._gate(context, program, noise)
        if weights is not None:
            context.results["models"]["int8"]["weights"] = weights
            tell = context.progress.say if weights["share"] >= LEAST_SHARE else context.progress.warn
            tell(f"{self.name}: {weights['said']}")
        return {"program": vars(program), "ranges_sha256": Ranges(prepared).digest(), "probe": probe}

    def _gate(self, context: Context, program: Program, noise: dict[str, float]) -> None:
        """Checks that int8 agrees with the fake-quantized model, in PyTorch and in its runtime.

        noise: signal to quantization noise ratio of each layer, in dB.
        """
        reference = evaluate(context.prepared().eval(), context.data.evaluation_batches(), context.task, context.world)
        bound, models = agreement_bound(context), context.results["models"]
        bits = context.config.qat.simulated_bits
        table = "\nsignal to quantization noise of each layer, the worst first:\n" + sqnr_table(noise) if noise else ""
        int8 = judge(context, open_program(program), reference)
        if int8.evaluation is not None:
            models["int8"] = dict(int8.evaluation.metrics)
            context.keep_details("int8", int8.evaluation)
            if bits:
                models["int8"]["simulated_bits"] = bits
        hint = (
            "if one layer is far worse, leave it in floating point by --qat.rules; else train qat longer, "
            "or loosen --convert.agreement_bound; then run again"
        )
        gate = Gate(
            name="convert", value=int8.agreed, bound=bound, passed=int8.agreed >= bound, hint=hint, detail=table
        )
        context.gates.check(gate)
        opened = simulation(bits) if bits else open_in_runtime(context, program)
        if not isinstance(opened, Lowered):
            context.progress.say(f"{self.name}: int8 was checked in PyTorch only: {opened}")
            context.gates.skip("lowered", opened)
            return
        lowered = judge(context, opened.call, reference) if program.lowers else int8
        if lowered.evaluation is not None:
            models["int8"]["lowered"] = {"runtime": opened.name, **lowered.evaluation.metrics}
        table = f"\nin PyTorch {int8.agreed:.6g} agree, so the cause is {opened.name}, not the layers{table}"
        hint = (
            f"set --convert.runtime to another runtime or none, and do not deploy it in {opened.name}; "
            "or loosen --convert.agreement_bound; then run again"
        )
        hint = wrong_here(hint) if program.lowers else hint
        context.gates.check(
            dataclasses.replace(
                gate,
                name="lowered",
                value=lowered.agreed,
                passed=lowered.agreed >= bound,
                hint=hint,
                detail=table,
                runtime=opened.name,
            )
        )

    def restore(self, context: Context, product: dict[str, Any]) -> None:
        return


@dataclass(frozen=True)
class Converted:
    """The product of the stage `convert`.

    Attributes:
        ranges_sha256: digest of the ranges used in the conversion.
        probe: on rank 0, `inputs` and the converted model's `outputs`, computed in memory; empty on other ranks.
    """

    program: Program
    ranges_sha256: str
    probe: dict[str, Tree]

    @classmethod
    def of(cls, product: Mapping[str, Any]) -> Converted:
        return cls(Program(**product["program"]), product["ranges_sha256"], product["probe"])


def count_weights(context: Context, prepared: PreparedModel) -> dict[str, Any] | None:
    """Returns `Int8Share.as_json` and a readable line, `said`; None if the backend cannot tell. Runs on one rank."""
    found = int8_share(context.model, prepared)
    if found is None:
        return None
    line = found.in_words()
    if found.share < LEAST_SHARE:
        dynamic = dynamic_of(context.data.described)
        line += f"; {advise(context.float_copy(), context.data.example(2), context.config.qat, found, dynamic)}"
    return {**found.as_json(), "said": line}
