"""Rules of the config: modules with other settings of quantization, and modules that stay in floating point."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn

from dist_train.config.fit import TypeMatch
from dist_train.config.stages import RuleConfig
from dist_train.errors import QuantizationError, ask_for, nearest


def resolve_rules(model: nn.Module, rules: Sequence[RuleConfig]) -> dict[str, RuleConfig]:
    """Resolves the rules: the first rule that matches a module, or a module around it, applies to it.

    Patterns are those of fnmatch. The model itself, "", is matched by its type and by `*`.

    Returns:
        Rules by the names of the modules that have one, in the model's order.

    Raises:
        QuantizationError: a rule matches no module, or only modules of earlier rules; or a rule for weights matches no
            module with weights.
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
    """Returns the modules that stay in floating point. resolved: from `resolve_rules`."""
    return [name for name, rule in resolved.items() if rule.skip]


def idle_skip(rule: RuleConfig) -> QuantizationError:
    """Returns the error for a skipping rule without which the same modules would stay in floating point."""
    return QuantizationError(
        f"the quantization rule {shown(rule)} changes nothing: "
        "what it leaves in floating point is not quantized by itself",
        "match the convolution or Linear before it, which stays in floating point together with what follows it, "
        "or remove the rule",
    )


def shown(rule: RuleConfig) -> str:
    """Formats a rule's match as a user writes it."""
    return f"{{type: {rule.match.type}}}" if isinstance(rule.match, TypeMatch) else repr(rule.match)


def _around(name: str) -> Iterator[str]:
    """Yields a module's name and those of the modules around it, up to the model, ""."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _matches(rule: RuleConfig, name: str, modules: dict[str, nn.Module]) -> bool:
    if isinstance(rule.match, TypeMatch):
        return any(fnmatch.fnmatchcase(kind, rule.match.type) for kind in _types(modules[name]))
    return fnmatch.fnmatchcase(name, rule.match)


def _types(module: nn.Module) -> list[str]:
    """Returns the names of a module's class and of its base classes below nn.Module."""
    return [kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module]


def _require_match(rule: RuleConfig, modules: dict[str, nn.Module]) -> None:
    matched = [name for name in modules if _matches(rule, name, modules)]
    if not matched:
        if isinstance(rule.match, TypeMatch):
            wanted, before = rule.match.type, "type "
            known = sorted({name for module in modules.values() for name in _types(module)})
        else:
            wanted, before = rule.match, ""
            known = [name for name in modules if name]
        near = nearest(wanted, known, 3) or known[:5]
        raise QuantizationError(
            f"the quantization rule {shown(rule)} matches no module", ask_for([before + name for name in near])
        )
    if rule.weight is not None and not any(_has_weights(modules[name]) for name in matched):
        raise QuantizationError(
            f"the quantization rule {shown(rule)} is for weights, and what it matches has none: "
            f"{', '.join(matched[:3])}",
            "match a convolution or a Linear, or remove `weight` from the rule",
        )


def _has_weights(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())
