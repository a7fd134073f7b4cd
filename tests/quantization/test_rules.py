"""Rules: which of them holds for which module."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from dist_train.config.stages import RuleConfig
from dist_train.errors import QuantizationError
from dist_train.quantization.rules import resolve_rules, skipped_modules


class OwnConv(nn.Conv2d):
    """A library's own convolution."""


def model() -> nn.Module:
    return nn.ModuleDict(
        {
            "stem": OwnConv(3, 4, 3),
            "layer": nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
            "head": nn.Linear(4, 2),
        }
    )


def rule(match: Any, **settings: Any) -> RuleConfig:
    return RuleConfig.model_validate({"match": match, **settings})


FOUR = {"weight": {"bits": 4}}


def test_the_first_rule_that_matches_holds() -> None:
    rules = [rule("layer.2", **FOUR), rule("layer.*", skip=True), rule("*", weight={"granularity": "tensor"})]
    resolved = resolve_rules(model(), rules)
    assert [resolved[name] for name in ("layer.2", "layer.0", "layer.1", "stem", "")] == [
        rules[i] for i in (0, 1, 1, 2, 2)
    ]
    assert skipped_modules(resolved) == ["layer.0", "layer.1"]


def test_a_rule_for_a_module_holds_for_what_is_inside() -> None:
    resolved = resolve_rules(model(), [rule("layer", skip=True)])
    assert list(resolved) == ["layer", "layer.0", "layer.1", "layer.2"]


def test_a_rule_behind_a_broader_one_is_refused() -> None:
    with pytest.raises(QuantizationError, match=r"'layer.0' is never reached"):
        resolve_rules(model(), [rule("layer", skip=True), rule("layer.0", **FOUR)])


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("Conv2d", ["stem", "layer.0", "layer.2"]), ("OwnConv", ["stem"]), ("Lin*", ["head"])],
)
def test_types_match_by_name_and_subclasses_with_them(pattern: str, names: list[str]) -> None:
    assert list(resolve_rules(model(), [rule({"type": pattern}, **FOUR)])) == names


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        (rule("headd", skip=True), "'headd' matches no module", "did you mean head?"),
        (rule({"type": "Conv2"}, skip=True), "{type: Conv2} matches no module", "did you mean type Conv2d"),
        (rule({"type": "LSTM"}, skip=True), "{type: LSTM} matches no module", "did you mean type "),
        (
            rule({"type": "BatchNorm2d"}, **FOUR),
            "is for weights, and what it matches has none: layer.1",
            "remove `weight`",
        ),
    ],
)
def test_a_rule_that_matches_nothing_names_what_is_near(given: RuleConfig, message: str, hint: str) -> None:
    with pytest.raises(QuantizationError) as error:
        resolve_rules(model(), [given])
    assert message in error.value.message
    assert hint in error.value.hint


def test_a_rule_that_is_given_twice_is_never_reached_the_second_time() -> None:
    for second in (rule("stem", skip=True), rule("stem", **FOUR)):
        with pytest.raises(QuantizationError, match=r"'stem' is never reached"):
            resolve_rules(model(), [rule("stem", skip=True), rule("head", **FOUR), second])
