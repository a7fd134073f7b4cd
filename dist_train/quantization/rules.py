"""Rules of the config: which modules are quantized otherwise than the rest, and which not at all."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn

from dist_train.config.stages import RuleConfig, TypeMatch
from dist_train.errors import QuantizationError


def resolve_rules(model: nn.Module, rules: Sequence[RuleConfig]) -> dict[str, RuleConfig]:
    """The rule of each module that has one, by its name, in the model's order: the first that matches it or a module around it.

    Patterns are those of fnmatch. The model itself, "", is matched by its type and by `*`.

    Raises:
        QuantizationError: a rule matches no module, or only what earlier ones match; or one for weights, no module with weights.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for rule in rules:
        _require_match(rule, modules)
    resolved, reached = {}, set[int]()
    for name in modules:
        around = list(_around(name))
        for index, rule in enumerate(rules):
            if any(_matches(rule, each, modules) for each in around):
                resolved[name] = rule
                reached.add(index)
                break
    for index, rule in enumerate(rules):
        if index not in reached:
            raise QuantizationError(
                f"the quantization rule {shown(rule)} is never reached: earlier ones match all that it does",
                "put it before them, or remove it: the first rule that matches holds",
            )
    return resolved


def skipped_modules(resolved: dict[str, RuleConfig]) -> list[str]:
    """Those of `resolve_rules` that stay in floating point."""
    return [name for name, rule in resolved.items() if rule.skip]


def idle_skip(rule: RuleConfig) -> QuantizationError:
    """The error for a rule that leaves nothing in floating point which would not be there without it."""
    return QuantizationError(
        f"the quantization rule {shown(rule)} changes nothing: what it leaves in floating point is not quantized by itself",
        "match the convolution or Linear before it, which stays in floating point together with what follows it, or remove the rule",
    )


def shown(rule: RuleConfig) -> str:
    """What a rule matches, as a person writes it."""
    return f"{{type: {rule.match.type}}}" if isinstance(rule.match, TypeMatch) else repr(rule.match)


def _around(name: str) -> Iterator[str]:
    """The module, what it is in, and so on up to the model, ""."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _matches(rule: RuleConfig, name: str, modules: dict[str, nn.Module]) -> bool:
    if isinstance(rule.match, TypeMatch):
        return any(fnmatch.fnmatchcase(kind, rule.match.type) for kind in _types(modules[name]))
    return fnmatch.fnmatchcase(name, rule.match)


def _types(module: nn.Module) -> list[str]:
    """The names of a module's class and of those that it derives from, as far as they tell modules apart."""
    return [kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module]


def _require_match(rule: RuleConfig, modules: dict[str, nn.Module]) -> None:
    matched = [name for name in modules if _matches(rule, name, modules)]
    if not matched:
        if isinstance(rule.match, TypeMatch):
            wanted, kind = rule.match.type, "type"
            known = sorted({name for module in modules.values() for name in _types(module)})
        else:
            wanted, kind = rule.match, ""
            known = [name for name in modules if name]
        near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4) or known[:5]
        raise QuantizationError(
            f"the quantization rule {shown(rule)} matches no module",
            f"did you mean {kind + ' ' if kind else ''}{' or '.join(near)}?" if near else "",
        )
    if rule.weight is not None and not any(_has_weights(modules[name]) for name in matched):
        raise QuantizationError(
            f"the quantization rule {shown(rule)} is for weights, and what it matches has none: {', '.join(matched[:3])}",
            "match a convolution or a Linear, or remove `weight` from the rule",
        )


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())
