"""Contradictions of ptq, qat and rules, and rules that a backend cannot follow."""

from __future__ import annotations

from typing import Any

import pytest

from dist_train.config.checks.general import contradictions
from dist_train.config.tree import Config
from dist_train.errors import Problem


def problems(tree: dict[str, Any]) -> list[Problem]:
    found = contradictions(Config.model_validate(tree), {})
    assert all(problem.hint for problem in found), "a contradiction ends with what to type"
    return found


def rules(*given: dict[str, Any], backend: str = "pt2e") -> dict[str, Any]:
    return {"qat": {"backend": backend, "rules": [{"match": "fc", **rule} for rule in given]}}


FOUR, EIGHT = {"bits": 4}, {"bits": 8}


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"qat": {"budget": 0.5}}, []),
        ({"qat": {"budget": 0.5}, "stages": ["train", "qat"]}, ["qat.budget"]),
        ({"qat": {"budget": 0.5}, "stages": ["train"]}, []),
        ({"qat": {"always": True}}, ["qat.always"]),
        ({"qat": {"always": True, "budget": 1}}, []),
        ({"ptq": {"percentile": 99.9}}, ["ptq.percentile"]),
        ({"ptq": {"percentile": 99.9, "ranges": "mse"}}, ["ptq.percentile"]),
        ({"ptq": {"percentile": 99.9, "ranges": "percentile"}}, []),
        ({"qat": {"observer": "min_max"}}, []),
        ({"qat": {"observer": "min_max", "averaging": 0.1}}, ["qat.averaging"]),
        (rules({"skip": True}, {"weight": FOUR}, {"activation": FOUR}), []),
        (rules({}), ["qat.rules.0"]),
        (rules({"skip": True, "weight": FOUR}), ["qat.rules.0"]),
        (rules({"activation": {"granularity": "channel"}}), ["qat.rules.0.activation.granularity"]),
        (rules({"skip": True}, {"weight": {"granularity": "tensor"}}, backend="fx"), []),
        (rules({"weight": FOUR}, backend="fx"), ["qat.rules.0.weight.bits"]),
        (rules({"weight": {"scheme": "affine"}}, backend="fx"), ["qat.rules.0.weight.scheme"]),
        (rules({"skip": True}, {"activation": EIGHT}, backend="fx"), ["qat.rules.1.activation"]),
        (rules({"skip": True}, backend="eager"), ["qat.rules.0"]),
        ({**rules({"weight": FOUR}), "export": {"formats": ["onnx"]}}, ["export.formats"]),
        ({**rules({"weight": FOUR}), "export": {"formats": ["onnx"], "models": ["fp32"]}}, []),
        ({**rules({"weight": EIGHT}), "export": {"formats": ["onnx"]}}, []),
    ],
)
def test_settings_of_quantization_that_contradict_each_other(tree: dict[str, Any], expected: list[str]) -> None:
    assert [problem.place for problem in problems(tree)] == expected


def test_fewer_bits_than_a_backend_computes_in_say_which_one_simulates_them() -> None:
    (problem,) = problems(rules({"weight": FOUR}, backend="fx"))
    assert "8 bits, not 4" in problem.message
    assert problem.hint == "--qat.backend pt2e"


def test_the_stages_say_whether_the_run_quantizes() -> None:
    assert not Config.model_validate({"stages": ["train", "half", "export"]}).quantizes
    assert all(Config.model_validate({"stages": [stage]}).quantizes for stage in ("ptq", "qat", "convert"))


def test_the_widths_that_are_simulated_are_those_below_8() -> None:
    config = Config.model_validate(
        rules({"weight": FOUR}, {"activation": {"bits": 3}, "weight": EIGHT}, {"skip": True})
    )
    assert config.qat.simulated_bits == [3, 4]
