"""`format: auto`: the fastest of the runtimes that answer right, and why the others are not it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dist_train import registry
from dist_train.lowering import latency
from dist_train.lowering.agreement import Decisions
from dist_train.lowering.autoselect import Choice, choose_format, cost, slower_than_float
from dist_train.lowering.base import LoweringUnavailable, Reference, Written
from dist_train.tasks import Classification
from tests.support.clock import Clock
from tests.support.compilers import hide_compiler
from tests.support.converted_nets import float_net, images

pytestmark = pytest.mark.heavy

clock = Clock()


def runtime(seconds: float, factor: float = 1.0, extra: float = 0.0, of_float: float = 0.0) -> registry.Entry:
    """A format whose runtime takes `seconds`, plus `extra` for int8 and `of_float` for FP32; outputs times `factor`."""

    def write(model: nn.Module, example: Tensor, threads: int) -> Written:
        def call(batch: Tensor) -> Tensor:
            clock.sleep(seconds + (extra if isinstance(model, Int8) else of_float))
            answer: Tensor = model(batch)
            return factor * answer

        return Written({"bin": b"written"}, call, f"runtime {seconds}", "never")

    return registry.Entry(write)


def swapping(model: nn.Module, example: Tensor, threads: int) -> Written:
    """Answers almost right, and decides otherwise on the last row of several."""

    def call(batch: Tensor) -> Tensor:
        answer: Tensor = model(batch).clone()
        if len(batch) > 1:
            first, second = answer[-1].topk(2).indices
            answer[-1, first], answer[-1, second] = answer[-1, second].clone(), answer[-1, first].clone()
        return answer

    return Written({"bin": b"written"}, call, "swapping 1", "never")


def refusing(model: nn.Module, example: Tensor, threads: int) -> Written:
    raise LoweringUnavailable("it wants another model")


class Int8(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = float_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def decisions(model: nn.Module) -> Decisions:
    return Decisions(model, Classification(10, {}), [images(4)], 0.99)


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, registry.Entry]], Choice]:
    hide_compiler(monkeypatch)
    monkeypatch.setattr(latency, "time", clock)

    def choose(formats: dict[str, registry.Entry]) -> Choice:
        monkeypatch.setattr(registry.export_formats, "_entries", formats)
        int8, net = Int8().eval(), float_net()
        models = {"int8": Reference(call=int8, source=int8), "fp32": Reference(call=net, source=net)}
        return choose_format("int8", models, images(4), images, [1, 2], 1, decisions(int8))

    return choose


def test_the_fastest_that_answers_right_is_chosen_and_the_others_say_why_not(choose) -> None:
    choice = choose(
        {
            "quick": runtime(0.004, of_float=0.08),
            "slow": runtime(0.02, of_float=0.05),
            "wrong": runtime(0.0, factor=-1.0),
            "refusing": registry.Entry(refusing),
            "absent": registry.Entry("no:where", requires={"no_such_module_at_all": "no-such-package"}),
        }
    )
    assert choice.best is not None
    assert (choice.best.format, choice.best.written.files) == ("quick", {"bin": b"written"})
    rows = {row["format"]: row for row in choice.rows()}
    assert [name for name, row in rows.items() if row["chosen"]] == ["quick"]
    assert (rows["quick"]["difference"], rows["quick"]["agreement"]) == (0.0, 1.0)
    assert {model: set(times) for model, times in rows["slow"]["latency_ms"].items()} == {
        "int8": {"1", "2"},
        "fp32": {"1", "2"},
    }
    assert "answers differently (2 of the largest output)" in rows["wrong"]["left_out"]
    assert rows["refusing"]["left_out"] == "it wants another model"
    assert rows["absent"]["left_out"] == "pip install no-such-package"
    assert "no C++ compiler" in rows["pt2"]["left_out"]
    assert choice.why().startswith("the fastest of runtime 0.004, runtime 0.02 on the machine that exported it; ")
    assert "refusing left out: it wants another model" in choice.why()
    said = "\n".join(choice.lines())
    assert "int8: quick for runtime 0.004, the fastest that answers right (the next takes " in said
    assert "warning" not in said


def test_a_runtime_that_decides_otherwise_is_left_out_though_its_numbers_are_close(choose) -> None:
    choice = choose({"swapping": registry.Entry(swapping), "slow": runtime(0.02)})
    assert choice.best is not None
    assert choice.best.format == "slow"
    row = next(row for row in choice.rows() if row["format"] == "swapping")
    assert "decides the same on 75 % of 4 samples, and convert.agreement_bound is 0.99" in row["left_out"]


def test_int8_slower_than_float_in_its_runtime_is_warned_of(choose) -> None:
    lines = choose({"quick": runtime(0.002, extra=0.02)}).lines()
    assert [line.partition(":")[0] for line in lines[-2:]] == ["warning", "warning"]
    assert "in runtime 0.002 int8 is slower than FP32 at batch 1" in lines[-2]
    assert "(the only one)" in lines[-3]


def test_without_any_runtime_there_is_no_choice_and_it_says_what_to_install(choose) -> None:
    choice = choose({"refusing": registry.Entry(refusing)})
    assert choice.best is None
    assert "pip install 'dist-train[openvino,onnx]'" in choice.lines()[-1]
    assert all(not row["chosen"] for row in choice.rows())


def test_torchscript_runs_as_it_is_with_the_float_model_traced_beside_it() -> None:
    net = float_net()
    traced = torch.jit.trace(net, images(2), check_trace=False)
    models = {"int8": Reference(call=traced, source=None), "fp32": Reference(call=net, source=net)}
    choice = choose_format("int8", models, images(4), images, [1], 1, decisions(traced))
    assert choice.best is not None
    assert (choice.best.runtime, choice.best.format, choice.best.written) == ("torchscript", "pt2", None)
    assert set(choice.best.latency_ms) == {"int8", "fp32"}


def test_a_ratio_weighs_alike_at_every_batch_size() -> None:
    assert cost({"1": 1.0, "32": 200.0}) == pytest.approx(cost({"1": 2.0, "32": 100.0}))


def test_a_difference_within_the_noise_is_no_warning() -> None:
    assert slower_than_float({"int8": {"1": 1.04}, "fp32": {"1": 1.0}}, "swift") == []
    assert slower_than_float({"int8": {"1": 1.2}, "fp32": {"1": 1.0}}, "swift") == [
        "warning: in swift int8 is slower than FP32 at batch 1: 1.2 ms against 1"
    ]
    assert slower_than_float({"int8": {"1": 1.2}}, "swift") == []
