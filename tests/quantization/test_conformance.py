"""Every model with every backend: the whole way, or a refusal that says what to do; and the docs say what was seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.quantization import conformance
from tests.quantization.conformance import BACKENDS, MODELS, PAGE, Model, is_int8


def test_the_pages_table_is_that_of_the_record() -> None:
    assert conformance.block(PAGE.read_text()) == conformance.table(conformance.record())


def test_each_model_of_torchvision_goes_the_whole_way_with_pt2e_and_fx() -> None:
    seen = conformance.record()
    assert list(seen) == [model.name for model in MODELS]
    refused = {(name, backend) for name, row in seen.items() for backend in ("pt2e", "fx") if not is_int8(row[backend])}
    assert refused == {("branch_on_data", "pt2e"), ("branch_on_data", "fx")}


def test_each_refusal_says_what_to_change() -> None:
    for row in conformance.record().values():
        for outcome in row.values():
            message, _, hint = outcome.partition(" -> ")
            assert is_int8(outcome) or (message and hint)


IN_CI = ("mlp", "reused_module", "same_padding", "branch_on_data")


def marked(model: Model) -> ParameterSet:
    return pytest.param(model, id=model.name, marks=pytest.mark.slow if model.name in IN_CI else pytest.mark.long)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", map(marked, MODELS))
def test_the_record_is_what_happens(model: Model, backend: str, tmp_path: Path) -> None:
    assert conformance.try_pair(model, backend, tmp_path) == conformance.record()[model.name][backend]
