"""Conversion to int8: by rank 0 alone, on a CPU copy; then evaluated by all ranks, in process and in its runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.artifact.deployable import simulation
from dist_train.config.stages import ConvertConfig, QATConfig, simulated_bits
from dist_train.programs.program import Program, open_program
from dist_train.quantization.backend import build_backend
from dist_train.quantization.int8_share import LEAST_SHARE, Coverage, coverage, in_percent
from dist_train.quantization.layer_sqnr import in_words, layer_noise, noise_table
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from dist_train.quantization.rules import resolve_rules
from dist_train.run_dir.gates import Gate
from dist_train.stages.base import Stage
from dist_train.stages.context import Context
from dist_train.stages.int8_evaluation import InRuntime, agreement_bound, convert_on_rank_0, judge, open_in_runtime
from dist_train.training.evaluate import evaluate

_NOISE_ROWS = 8  # all outputs of all layers are kept for them


class Convert(Stage):
    """Makes the int8 program, evaluates it exactly, and compares its decisions with the fake-quantized model's."""

    settings: ConvertConfig

    def run(self, context: Context) -> dict[str, Any]:
        prepared = context.prepared()
        probe: dict[str, torch.Tensor] = {}

        def inspect(converted: nn.Module) -> dict[str, Any]:
            # What the artifact must answer is asked of the model in memory, before it is serialised.
            probe["inputs"] = context.data.probe_inputs()
            with torch.no_grad():
                probe["outputs"] = converted(probe["inputs"])
            noise = layer_noise(prepared, converted, probe["inputs"][:_NOISE_ROWS])
            return {"noise": noise, "weights": count_weights(context, prepared)}

        context.progress.say(f"{self.name}: rank 0 converts to int8")
        program, found = convert_on_rank_0(context, prepared, inspect)
        noise, weights = found["noise"], found["weights"]
        context.results["layer_sqnr_db"] = {layer: in_words(ratio) for layer, ratio in noise.items()}
        prepared.observe(False)
        self._gate(context, program, noise)
        if weights is not None:
            context.results["models"]["int8"]["weights"] = weights
            tell = context.progress.say if weights["share"] >= LEAST_SHARE else context.progress.warn
            tell(f"{self.name}: {weights['said']}")
        return {"program": vars(program), "ranges_sha256": Ranges(prepared).digest(), "probe": probe}

    def _gate(self, context: Context, program: Program, noise: dict[str, float]) -> None:
        """Checks that int8, in process and in its runtime, decides as the fake-quantized model; `noise`: the layers' ratios."""
        reference = evaluate(context.prepared().eval(), context.data.evaluation_batches(), context.task, context.world)
        bound, models = agreement_bound(context), context.results["models"]
        bits = simulated_bits(context.config.qat.rules)
        table = "\nsignal to quantization noise of each layer, the worst first:\n" + noise_table(noise) if noise else ""
        int8 = judge(context, open_program(program), reference)
        if int8.evaluation is not None:
            models["int8"] = dict(int8.evaluation.metrics)
            context.keep_details("int8", int8.evaluation)
            if bits:
                models["int8"]["simulated_bits"] = bits
        hint = (
            "where a layer stands out, leave it in floating point by --qat.rules; else train qat longer, "
            "or loosen --convert.agreement_bound; and run again"
        )
        gate = Gate(
            name="convert", value=int8.agreed, bound=bound, passed=int8.agreed >= bound, hint=hint, detail=table
        )
        context.gates.check(gate)
        opened = simulation(bits) if bits else open_in_runtime(context, program)
        if not isinstance(opened, InRuntime):
            context.progress.say(f"{self.name}: int8 was judged in process alone: {opened}")
            context.gates.skip("lowered", opened)
            return
        lowered = int8 if opened.name == "torchscript" else judge(context, opened.call, reference)
        if lowered.evaluation is not None:
            models["int8"]["lowered"] = {"runtime": opened.name, **lowered.evaluation.metrics}
        table = f"\nin process {int8.agreed:.6g} agree: the layers are not the cause, {opened.name} is{table}"
        hint = (
            f"--convert.runtime with another runtime, or none, and do not deploy it in {opened.name}; "
            "or loosen --convert.agreement_bound; and run again"
        )
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
    """The product of `convert`.

    Attributes:
        ranges_sha256: digest of the ranges that the program was converted with.
        probe: on rank 0, `inputs` and the converted model's `outputs`, as computed in memory; empty on other ranks.
    """

    program: Program
    ranges_sha256: str
    probe: dict[str, Tensor]

    @classmethod
    def of(cls, product: Mapping[str, Any]) -> Converted:
        return cls(Program(**product["program"]), product["ranges_sha256"], product["probe"])


_OTHERS = ("pt2e", "fx")  # eager takes only models that are made for it


def count_weights(context: Context, prepared: PreparedModel) -> dict[str, Any] | None:
    """Returns `Coverage.as_json` and a line for people as `said`; None where the backend cannot tell. On one rank."""
    found = coverage(context.model, prepared)
    if found is None:
        return None
    line = found.in_words()
    if found.share < LEAST_SHARE:
        line += f"; {_advice(context.float_copy(), context.data.example(2), context.config.qat, found)}"
    return {**found.as_json(), "said": line}


def _advice(model: nn.Module, example: Tensor, settings: QATConfig, found: Coverage) -> str:
    """Says what left the weights in floating point, and which backend, as tried, takes more of them."""
    skipped = {name for name, rule in resolve_rules(model, settings.rules).items() if rule.skip}
    by_rules = sum(count for name, count in found.left_float.items() if name in skipped)
    parts = [f"qat.rules leave {by_rules:,} of them in floating point"] if by_rules else []
    shares = {name: _share(model, example, settings, name) for name in _OTHERS if name != settings.backend}
    best = max(shares, key=lambda name: shares[name])
    if shares[best] > found.share + 0.01:
        parts.append(f"--qat.backend {best} takes {in_percent(shares[best])} %")
    elif not by_rules:
        parts.append("no other backend takes more, so that the file is smaller and the model faster in that part only")
    return "; ".join(parts)


def _share(model: nn.Module, example: Tensor, settings: QATConfig, backend: str) -> float:
    """Returns the share of the weights that another backend takes; 0 where it does not take the model."""
    try:
        other = build_backend(settings.model_copy(update={"backend": backend, "engine": "auto"}))
        found = coverage(model, other.prepare(model, example, settings.rules))
    except Exception:  # advice only: no failure of an unused backend may end the run
        return 0.0
    return found.share if found is not None else 0.0
