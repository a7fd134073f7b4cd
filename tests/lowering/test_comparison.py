"""Models side by side: each in a runtime that is right for it, and no time for a wrong answer."""

from __future__ import annotations

import pytest
import torch

from dist_train.lowering import Lowered, LoweringUnavailable
from dist_train.lowering.base import Reference
from dist_train.lowering.comparison import is_rounding, relative_difference, require_same_outputs, time_models
from dist_train.lowering.openvino import computes_in, missing_modules
from dist_train.models.half_precision import HalfModel
from tests.support.converted_nets import float_net, images

needs_openvino = pytest.mark.skipif(bool(missing_modules()), reason=f"not installed: {', '.join(missing_modules())}")


@pytest.mark.heavy
@needs_openvino
@pytest.mark.parametrize(("name", "precision"), [("bf16", "bf16"), pytest.param("fp16", "f16", marks=pytest.mark.slow)])
def test_half_is_timed_in_the_runtime_of_the_others_where_it_computes_in_half(name, precision, program, converted):
    net = float_net()
    half = HalfModel(net, name)
    models = {
        "fp32": Reference(call=net, source=net),
        name: Reference(call=half, source=half, half=name),
        "int8": Reference(call=converted, source=program),
    }
    times, runtimes = time_models(models, images, [1], 1)
    expected = "openvino" if computes_in(precision) else "eager"
    assert runtimes == {"fp32": "openvino", name: expected, "int8": "openvino"}
    assert all(each["1"] > 0 for each in times.values())


def test_wrong_answers_are_not_timed():
    wrong = Lowered("swift", lambda batch: -float_net()(batch))
    with pytest.raises(LoweringUnavailable, match=r"swift answers differently for fp32 at batch 3 \(2 of the largest"):
        require_same_outputs("fp32", wrong, Reference(call=float_net(), source=None), images(3))
    nan = Lowered("swift", lambda batch: float_net()(batch) * float("nan"))
    with pytest.raises(LoweringUnavailable, match="nan of the largest"):
        require_same_outputs("fp32", nan, Reference(call=float_net(), source=None), images(3))


def test_a_difference_is_in_units_of_the_largest_output():
    expected = torch.tensor([2.0, -4.0])
    assert relative_difference(expected + 1, expected) == 0.25


def test_a_model_that_multiplies_roundings_may_differ_by_what_it_differs_by_itself(program):
    stable, batch = program.module(), images(8)
    steep = Reference(
        call=lambda batch: torch.sin(300 * stable(batch)), source=program
    )  # a last bit of its input decides
    assert is_rounding(0.5, steep, batch)
    assert not is_rounding(0.5, Reference(call=stable, source=program), batch)
    assert not is_rounding(0.5, Reference(call=steep.call, source=None), batch)  # a float model is not rounded
    assert not is_rounding(float("nan"), steep, batch)
    assert is_rounding(0.2, Reference(call=stable, source=program), batch)
