"""The choice of a runtime, and latencies that can be compared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_train.lowering import LoweringUnavailable, compare_latency, latency, lower, measure_latency
from dist_train.lowering.openvino import missing_modules
from tests.support.clock import Clock
from tests.support.compilers import hide_compiler
from tests.support.converted_nets import images


@pytest.mark.skipif(bool(missing_modules()), reason=f"not installed: {', '.join(missing_modules())}")
def test_openvino_comes_first(converted):
    assert lower(converted, images(1), threads=1).name == "openvino"


@pytest.mark.skipif(not missing_modules(), reason="only without OpenVINO")
def test_without_any_runtime_it_says_what_to_install(converted, monkeypatch):
    hide_compiler(monkeypatch)
    with pytest.raises(LoweringUnavailable, match=r"pip install 'dist-train\[openvino,onnx\]'"):
        lower(converted, images(1), threads=1)


def test_calls_take_turns_on_the_same_input_and_the_slower_one_is_slower(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    order: list[tuple[str, int]] = []

    def sleeper(name: str, seconds: float):
        def call(batch: Tensor) -> Tensor:
            order.append((name, len(batch)))
            clock.sleep(seconds)
            return batch

        return call

    calls = {"fast": sleeper("fast", 0.001), "slow": sleeper("slow", 0.02)}
    result = compare_latency(calls, lambda size: torch.zeros(size, 1), batch_sizes=(1, 3), seconds=0.05)
    assert {name: list(times) for name, times in result.items()} == {"fast": ["1", "3"], "slow": ["1", "3"]}
    assert result["fast"] == pytest.approx({"1": 1.1, "3": 1.1})  # milliseconds, a look at the clock in them
    assert result["slow"] == pytest.approx({"1": 20.1, "3": 20.1})
    timed = [name for name, size in order if size == 1][4:]  # after two warm-up calls of each
    assert timed[0::2] == ["fast"] * (len(timed) // 2)
    assert timed[1::2] == ["slow"] * (len(timed) // 2)


def test_a_call_longer_than_the_budget_is_still_measured_five_times():
    sizes: list[int] = []

    def call(batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return batch

    assert list(measure_latency(call, lambda size: torch.zeros(size), batch_sizes=(2,), seconds=0.0)) == ["2"]
    assert sizes == [2] * 7
