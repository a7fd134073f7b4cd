"""Tests fp16 and bf16: all ranks skip the same overflowing steps, and a resumed run repeats them to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.distributed.world import World
from dist_train.errors import NonFiniteLossError
from dist_train.run_dir.ledger import Ledger, check, record_expectation
from dist_train.run_dir.paths import RunDir
from dist_train.strategies.single import Single
from dist_train.training.loop import fit
from dist_train.training.step import train_step
from tests.support.ranks import call
from tests.support.training_loops import Watch, flat, make, mlp


class _Steepen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.factor, None


class Steep(nn.Module):
    """Multiplies the gradient by `factor`, so that fp16 overflows until the loss scale is low enough."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steepened: torch.Tensor = _Steepen.apply(x, self.factor)
        return steepened


def steep(factor: float) -> nn.Module:
    model = mlp()
    assert isinstance(model, nn.Sequential)
    return nn.Sequential(*model[:-1], Steep(factor), model[-1])


def _skipping(world: World, folder: str) -> dict[str, Any]:
    """Trains two epochs of four steps, of which the first are skipped; then again from a checkpoint among these."""
    run_dir = RunDir(Path(folder))
    settings = {"clip_grad_norm": 0.5, "ema_decay": 0.8, "optim": {"lr": 0.01}, "evaluate_every": 2}
    model = steep(100.0)
    ledger = Ledger(run_dir, world.rank, world.world_size, 0)
    rates = Watch(lambda: flat(model)[:4])
    made = make(
        world, model, precision="fp16", config=settings, checkpoint_every=2, hooks=[rates], ledger=ledger, micro=3
    )
    kept: dict[int, dict[str, Any]] = {}
    save = made.memory.save_step

    def keep(stage: str, step: int, state: dict[str, Any], best_first: Sequence[int], needed: int | None) -> None:
        save(stage, step, state, best_first, needed)
        kept[step] = made.memory.states[step]

    made.memory.save_step = keep  # type: ignore[method-assign]
    state = fit(made.run, None)
    ledger.sync()
    ledger.close()
    again = steep(100.0)
    resumed = fit(make(world, again, precision="fp16", config=settings, micro=3).run, kept[2])
    return {
        "skipped": state.skipped,
        "weights": rates.seen,
        "scale": made.run.strategy.scaler.get_scale(),
        "at 2": kept[2]["scaler"]["scale"],
        "same": flat(again) == flat(model) and flat(resumed.chosen) == flat(state.chosen),
        "resumed skipped": resumed.skipped,
        "lr": made.recorder.of("lr"),
        "losses": made.recorder.of("loss"),
    }


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_overflowing_steps_change_nothing_on_any_rank_and_are_in_the_ledger(world_size: int, tmp_path: Path) -> None:
    record_expectation(RunDir(tmp_path), 37, 37)
    if world_size == 1:
        answers = [_skipping(World(), str(tmp_path))]
    else:
        answers = call(world_size, "tests.strategies.test_precision_integration:_skipping", str(tmp_path))
    for found in answers:
        skipped = found["skipped"]
        assert 2 < skipped < 7, "some before the first checkpoint and some after it"
        assert found["scale"] == 65536 * 0.5**skipped and found["at 2"] == 65536 * 0.25
        assert all(found["weights"][step] == found["weights"][0] for step in range(skipped + 1))
        assert found["weights"][skipped + 1] != found["weights"][0]
        assert found["same"] and found["resumed skipped"] == skipped
        assert found["lr"][:skipped] == [0.01] * skipped and found["lr"][-1] < 0.01, "the schedule waits"
        assert all(map(math.isfinite, found["losses"]))
    assert {found["skipped"] for found in answers} == {answers[0]["skipped"]}
    lines = [json.loads(line) for line in RunDir(tmp_path).ledger_of(0).read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [step < answers[0]["skipped"] for step in range(8)]
    report = check(tmp_path)
    assert report.ok and report.skipped["train"][0] == answers[0]["skipped"], report


def test_gradients_that_are_not_finite_whatever_the_scale_end_the_run() -> None:
    model = steep(math.inf)
    made = make(World(), model, precision="fp16", epochs=20, size=40)
    with pytest.raises(NonFiniteLossError, match=r"gradients are not finite, but the loss is.*\n.*--precision bf16"):
        fit(made.run, None)
    assert all(map(math.isfinite, flat(model)))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_forward_is_in_the_precision_and_parameters_and_gradients_are_float32(
    precision: Any, dtype: torch.dtype
) -> None:
    model = mlp()
    seen: list[torch.dtype] = []
    model[-1].register_forward_hook(lambda module, inputs, outputs: seen.append(outputs.dtype))  # type: ignore[index]
    run = make(World(), model, precision=precision, size=10).run
    (batch,) = run.loader.epoch(0, 0, 1)
    train_step(run.strategy.wrap(model), batch, run.task, run.strategy, run.learner.reduction)
    assert seen == [dtype]
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    assert {each.grad.dtype for each in model.parameters() if each.grad is not None} == {torch.float32}


def test_clipping_sees_the_true_gradients_and_not_the_scaled_ones() -> None:
    norms = []
    for precision in ("fp32", "fp16"):
        model = mlp()
        strategy = Single(World(), precision)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        torch.manual_seed(0)
        with strategy.autocast():
            outputs = model(torch.rand(8, 1, 4, 4))
        strategy.backward(outputs.float().square().mean())
        outcome = strategy.step(optimizer, model, max_norm=1e-3)
        assert outcome.grad_norm is not None and not outcome.skipped
        norms.append(float(outcome.grad_norm))
        clipped = torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]).norm()
        assert float(clipped) == pytest.approx(1e-3, rel=1e-3)
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
