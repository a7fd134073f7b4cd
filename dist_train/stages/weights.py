"""Which weights became int8, and what would take those that did not; said, recorded, and warned of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dist_train.config_fit import QATConfig
from dist_train.quantization.backend import build_backend
from dist_train.quantization.coverage import LEAST_SHARE, Coverage, coverage, in_percent
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.rules import resolve_rules
from dist_train.stages.context import Context

_OTHERS = ("pt2e", "fx")  # eager takes only models that are made for it


def count_weights(context: Context, prepared: PreparedModel) -> dict[str, Any] | None:
    """`Coverage.as_json`, and a line for people as `said`; None where the backend's model cannot be looked into. On one rank."""
    found = coverage(context.model, prepared)
    if found is None:
        return None
    line = found.in_words()
    if found.share < LEAST_SHARE:
        line += f"; {_advice(context.float_copy(), context.example(2), context.config.qat, found)}"
    return {**found.as_json(), "said": line}


def _advice(model: nn.Module, example: Tensor, settings: QATConfig, found: Coverage) -> str:
    """Whose decision the floats are, and which backend would take more, which is tried."""
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
    """Of the weights that another backend would take; 0 where it does not take the model."""
    try:
        other = build_backend(settings.model_copy(update={"backend": backend, "engine": "auto"}))
        found = coverage(model, other.prepare(model, example, settings.rules))
    except Exception:  # it is asked for advice only: nothing that goes wrong in it is to end a run that needs it not
        return 0.0
    return found.share if found is not None else 0.0
