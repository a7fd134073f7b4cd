"""Checks of the settings of ptq and qat, and of rules that a backend cannot follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from dist_train.config.checks.base import Checks, about, ignored
from dist_train.config.stages import RuleConfig
from dist_train.config.tree import Config
from dist_train.errors import Problem

QUANTIZATION_CHECKS: Checks = []
_about = partial(about, QUANTIZATION_CHECKS)


@_about("stages", "qat.budget", "qat.always", "ptq.ranges", "ptq.percentile", "qat.observer", "qat.averaging")
def _ptq_and_qat(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    stages, ptq, qat = set(config.stages), config.ptq, config.qat
    if "qat" in stages and qat.budget is not None and "ptq" not in stages:
        yield Problem(
            "qat.budget", "is compared with the loss of 'ptq', which is not in stages", hint="add ptq to the stages"
        )
    if qat.always and qat.budget is None:
        yield Problem("qat.always", "has no effect without a budget", hint="--qat.budget POINTS, or remove it")
    if ptq.ranges != "percentile":
        yield from ignored("ptq", ptq, ["percentile"], chosen_by="ranges")
    if qat.observer != "moving_average":
        yield from ignored("qat", qat, ["averaging"], chosen_by="observer")


@_about("qat.rules", "qat.backend")
def _rules(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    for number, rule in enumerate(config.qat.rules):
        place, backend = f"qat.rules.{number}", config.qat.backend
        parts = {"weight": rule.weight, "activation": rule.activation}
        if rule.skip and any(part is not None for part in parts.values()):
            yield Problem(place, "skips what it also quantizes", hint="remove skip, or weight and activation")
        if not rule.skip and all(part is None for part in parts.values()):
            yield Problem(place, "does nothing", hint="add skip: true, weight or activation, or remove the rule")
        if rule.activation is not None and rule.activation.granularity == "channel":
            message = "integer kernels sum over the input channels, so no backend quantizes activations per channel"
            yield Problem(f"{place}.activation.granularity", message, hint="granularity: tensor")
        if backend == "eager":
            message = "the eager backend takes no rules: stubs in the model say where integers begin and end"
            yield Problem(place, message, hint="--qat.backend pt2e, or --qat.rules '[]' and stubs in the model")
        elif backend == "fx":
            yield from _beyond_fx(place, rule)


def _beyond_fx(place: str, rule: RuleConfig) -> Iterator[Problem]:
    hint = "--qat.backend pt2e"
    for name, part in (("weight", rule.weight), ("activation", rule.activation)):
        if part is not None and part.bits != 8:
            message = f"the fx backend's kernels compute in 8 bits, not {part.bits}: fewer are simulated by pt2e only"
            yield Problem(f"{place}.{name}.bits", message, hint=hint)
    if rule.weight is not None and rule.weight.scheme != "symmetric":
        message = "the fx backend's kernels take weights without a zero point"
        yield Problem(f"{place}.weight.scheme", message, hint=hint)
    if rule.activation is not None:
        message = "the fx backend quantizes all activations alike, as its engine does"
        yield Problem(f"{place}.activation", message, hint=f"{hint}, or remove it from the rule")
