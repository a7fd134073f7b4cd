"""A buffer that a checkpoint could hold, and no new start could load, is refused by name or made loadable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dist_train
from tests.support.small_runs import Runs


class _Linear(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(x.flatten(1))
        return outputs


@dist_train.register_model("growing_for_test")
class Growing(_Linear):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.seen = torch.zeros(len(self.get_buffer("seen")) + 1)
        return super().forward(x)


@dist_train.register_model("expanded_for_test")
class Expanded(_Linear):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer("scale", torch.full((1,), 0.5).expand(num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.get_buffer("scale")


def test_a_buffer_that_grows_is_named_before_it_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs(tmp_path)
    assert runs("run", "--model.name", "growing_for_test", "--model.args", "{}") == 78
    error = capsys.readouterr().err
    assert "seen of the model has grown in training, from [1] to [" in error and "may be a fault" not in error
    assert runs.checkpoints("run").latest is None


def test_a_run_with_an_expanded_buffer_resumes(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    words = ("--model.name", "expanded_for_test", "--model.args", "{}", "--task.name", "interruptible")
    assert runs("whole", *words) == 0
    assert runs("run", *words, interrupt_at=18) == -1
    assert runs("run", *words) == 0
    assert runs.product("run") == runs.product("whole")
