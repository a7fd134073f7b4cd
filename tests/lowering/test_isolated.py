"""A crash of OpenVINO's compiler is met in another process, and becomes an error of ours."""

from __future__ import annotations

import pytest

from dist_train.lowering import LoweringUnavailable, isolated
from dist_train.lowering.openvino import lower, missing_modules, write
from tests.support.converted_nets import images

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(bool(missing_modules()), reason=f"not installed: {', '.join(missing_modules())}"),
]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "_ended_by", {})


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
@pytest.mark.parametrize("compile_model", [lower, write], ids=["onnx", "ir"])
def test_a_crash_is_an_error(name, compile_model, program, monkeypatch):
    end = f"import os, signal; os.kill(os.getpid(), signal.{name})"
    monkeypatch.setattr(isolated, "_PROGRAM", isolated._PROGRAM + end)
    with pytest.raises(LoweringUnavailable, match=rf"OpenVINO crashes \({name}\)"):
        compile_model(program, images(1), 1)


def test_the_same_model_is_tried_once(program, monkeypatch):
    monkeypatch.setattr(isolated, "_PROGRAM", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    for _ in range(2):
        with pytest.raises(LoweringUnavailable, match="SIGSEGV"):
            lower(program, images(1), 1)
        monkeypatch.setattr(isolated, "_PROGRAM", "pass")  # would end well


@pytest.mark.parametrize("compile_model", [lower, write], ids=["onnx", "ir"])
def test_a_model_that_compiles_there_is_compiled_here(compile_model, program):
    assert compile_model(program, images(1), 1).call(images(2)).shape == (2, 10)
    assert list(isolated._ended_by.values()) == [0], "it was tried, as it is quantized"


@pytest.mark.slow
def test_float_models_are_compiled_at_once(float_model):
    lower(float_model, images(1), 1)
    assert not isolated._ended_by
