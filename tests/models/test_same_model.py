"""A run is resumed with its own model, backend and rules, or refused with the difference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dist_train
from dist_train.config.stages import QATConfig, RuleConfig
from dist_train.errors import RunDirError
from dist_train.models.fingerprint import FLOAT, PREPARED, SameModel
from dist_train.quantization.backend import build_backend
from tests.support.one_net_all_backends import StubNet
from tests.support.small_runs import STEPS, Runs

EXAMPLE = torch.zeros(2, 1, 8, 8)


class Editable(nn.Module):
    """A model whose author changes `act` between two attempts."""

    act: nn.Module = nn.ReLU()

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 8), nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(Editable.act(self.hidden(x.flatten(1))))


@dist_train.register_model("editable")
def editable(num_classes: int) -> nn.Module:
    return Editable(num_classes)


@pytest.mark.slow
def test_code_that_changed_between_two_attempts_is_refused_and_undone_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(tmp_path)
    options = ["--model.name", "editable", "--model.args", "{}"]
    assert runs("run", *options, interrupt_at=STEPS + 3) == -1
    monkeypatch.setattr(Editable, "act", nn.Tanh())
    capsys.readouterr()
    assert runs("run", *options, "--task.name", "interruptible") == 78
    printed = "".join(capsys.readouterr())
    assert "the model's code computes something else than when this run began" in printed
    assert "tanh: it was relu" in printed and "--run.name NEW" in printed
    monkeypatch.undo()
    assert runs("run", *options, "--task.name", "interruptible") == 0


def state_of(model: nn.Module, name: str = FLOAT) -> dict[str, object]:
    same = SameModel()
    same.require(name, model, EXAMPLE)
    return same.state_dict()


def test_the_order_of_restoring_and_asking_does_not_matter() -> None:
    recorded, other = state_of(StubNet(5, 1)), StubNet(5, 1, momentum=0.5)
    first, second = SameModel(), SameModel()
    first.restore(recorded)
    with pytest.raises(RunDirError, match=r"bn1: native_batch_norm momentum 0.01 -> 0.5"):
        first.require(FLOAT, other, EXAMPLE)
    second.require(FLOAT, other, EXAMPLE)
    with pytest.raises(RunDirError, match=r"bn1: native_batch_norm momentum 0.01 -> 0.5"):
        second.restore(recorded)


def test_what_an_attempt_does_not_prepare_again_stays_recorded() -> None:
    recorded, model = state_of(StubNet(5, 1), PREPARED), StubNet(5, 1)
    same = SameModel()
    same.require(FLOAT, model, EXAMPLE)
    same.restore(recorded)
    assert same.state_dict()["models"].keys() == {FLOAT, PREPARED}


def test_nothing_is_compared_with_another_version_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    recorded = state_of(StubNet(5, 1))
    monkeypatch.undo()
    same = SameModel()
    same.restore(recorded)
    same.require(FLOAT, StubNet(5, 1, momentum=0.5), EXAMPLE)


@pytest.mark.parametrize(
    ("backend", "rules", "shown"),
    [
        ("eager", [], "quantizers.conv2_input.step_low"),
        ("fx", [RuleConfig(match="conv2", skip=True)], "conv2"),
    ],
    ids=["another backend", "another rule"],
)
def test_another_preparation_of_the_same_model_is_refused(backend: str, rules: list[RuleConfig], shown: str) -> None:
    def prepared(backend: str, rules: list[RuleConfig]) -> nn.Module:
        torch.manual_seed(0)
        made = build_backend(QATConfig.model_validate({"backend": backend}))
        return made.prepare(StubNet(5, 1), EXAMPLE, rules)

    same = SameModel()
    same.restore(state_of(prepared("fx", []), PREPARED))
    same.require(PREPARED, prepared("fx", []), EXAMPLE)
    with pytest.raises(RunDirError, match="quantization prepares another model") as error:
        same.require(PREPARED, prepared(backend, rules), EXAMPLE)
    assert shown in error.value.message
