"""Tests the loop in one process: selection, checkpoints, logs, resumption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.distributed.watchdog.heartbeat import Heartbeat
from dist_train.distributed.world import World
from dist_train.errors import NonFiniteLossError
from dist_train.tasks import Classification
from dist_train.training import loop
from dist_train.training.evaluate import Evaluation
from dist_train.training.loop import fit
from dist_train.training.step_log import StepLog
from tests.support.training_loops import CLASSES, Watch, flat, make, mlp, normed


class Planted(Classification):
    """Plants a NaN at one forward: in the outputs, or only in the gradients, with a loss of 0."""

    def __init__(self, at: int, only_gradient: bool = False) -> None:
        super().__init__(CLASSES, {})
        self._left, self._only_gradient = at, only_gradient

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self._left -= 1
        loss = super().loss(outputs, targets)
        if self._left != -1:
            return loss
        return (outputs * 0).abs().sqrt().sum(1) if self._only_gradient else loss * math.nan


class _Lagging(StepLog):
    """Reads a step's values one step later, as on CUDA."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lag = 1


def test_training_learns() -> None:
    model = mlp()
    made = make(World(), model, epochs=15)
    state = fit(made.run, None)
    assert state.metrics["top1"] > 0.9 and state.metrics["count"] == 37 and state.step == made.run.total_steps == 60
    assert not model.training


def test_looking_a_step_later_logs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    logged = []
    for step_log in (StepLog, _Lagging):
        monkeypatch.setattr(loop, "StepLog", step_log)
        model = mlp()
        made = make(World(), model, checkpoint_every=3)
        fit(made.run, None)
        lines = [
            {name: value for name, value in line.items() if name not in ("samples_per_second", "data_wait")}
            for line in made.recorder.lines
        ]
        logged.append((lines, made.memory.saved, flat(model)))
    assert logged[0] == logged[1]
    assert [line["step"] for line in logged[0][0] if "loss" in line] == list(range(8))


@pytest.mark.parametrize("step_log", [StepLog, _Lagging])
@pytest.mark.parametrize("step", [0, 4, 5, 7])
def test_nothing_is_saved_after_a_loss_that_is_not_finite(
    step: int, step_log: type[StepLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "StepLog", step_log)
    model = mlp()
    made = make(
        World(), model, checkpoint_every=1, task=Planted(step if step < 4 else step + 3)
    )  # between the epochs are 3 evaluation batches
    with pytest.raises(NonFiniteLossError, match=f"the loss of step {step} is not finite on rank 0"):
        fit(made.run, None)
    assert all(saved <= step for saved in made.memory.saved)
    assert len(made.recorder.of("loss")) == step


@pytest.mark.parametrize(("step", "saved"), [(2, [1, 2]), (3, [1, 2, 3]), (7, [1, 2, 3, 4, 5, 6, 7])])
def test_a_gradient_that_is_not_finite_reaches_no_checkpoint_and_no_evaluation(step: int, saved: list[int]) -> None:
    model = mlp()
    # Steps 3 and 7 end an epoch; between the epochs are 3 evaluation batches.
    task = Planted(step if step < 4 else step + 3, only_gradient=True)
    made = make(World(), model, checkpoint_every=1, task=task)
    with pytest.raises(
        NonFiniteLossError, match=rf"after step {step} the parameter 1\.weight is not finite, but the loss was"
    ):
        fit(made.run, None)
    assert made.memory.saved == saved and len(made.recorder.of("eval_loss")) == step // 4


def test_what_is_chosen_is_the_moving_average_where_there_is_one() -> None:
    model = mlp()
    watch = Watch(lambda: torch.tensor(flat(model)))
    made = make(World(), model, hooks=[watch], config={"ema_decay": 0.7})
    state = fit(made.run, None)
    after = [*watch.seen[1:], torch.tensor(flat(model))]
    average = after[0]
    for parameters in after[1:]:
        average = 0.7 * average + 0.3 * parameters
    assert state.chosen is not model
    assert flat(state.chosen) == pytest.approx(average.tolist(), abs=1e-6)
    assert (
        state.metrics
        == made.run.learner.evaluate(state.chosen).metrics
        != made.run.learner.evaluate(model.eval()).metrics
    )


def test_the_average_has_the_newest_statistics_and_ranges() -> None:
    model = normed()
    state = fit(make(World(), model, config={"ema_decay": 0.7}).run, None)
    buffers = dict(state.chosen.named_buffers())
    assert buffers["2.initialized"] and buffers["2.low"] < 0 < buffers["2.high"]
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def _scored(values: list[float], model: nn.Module) -> tuple[Any, list[list[float]]]:
    """Returns an evaluation with given results, and a record of the model at each call."""
    seen: list[list[float]] = []

    def evaluation(chosen: nn.Module) -> Evaluation:
        seen.append(flat(chosen))
        return Evaluation({"top1": values[len(seen) - 1], "loss": 1.0, "count": 37}, torch.empty(0))

    return evaluation, seen


@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize(
    ("values", "best"), [([0.1, 0.9, 0.5, 0.9], 1), ([0.9, 0.1, 0.1, 0.1], 0), ([0.1, 0.2, 0.3, 0.4], 3)]
)
def test_the_best_epochs_model_is_handed_on_where_that_is_asked_for(
    values: list[float], best: int, ema: float | None
) -> None:
    for select, expected in (("best", best), ("last", 3)):
        model = mlp()
        evaluation, seen = _scored(values, model)
        made = make(
            World(),
            model,
            epochs=4,
            config={"select": select, "ema_decay": ema},
            evaluate_with=evaluation,
            checkpoint_every=3,
        )
        state = fit(made.run, None)
        assert flat(state.chosen) == seen[expected] and state.metrics["top1"] == values[expected]
        assert not state.chosen.training


def test_evaluation_comes_at_its_interval_and_at_the_end() -> None:
    model = mlp()
    evaluation, seen = _scored([0.3, 0.5, 0.4], model)
    made = make(World(), model, epochs=5, config={"evaluate_every": 2, "select": "best"}, evaluate_with=evaluation)
    state = fit(made.run, None)
    assert [(line["epoch"], line["eval_top1"]) for line in made.recorder.lines if "eval_top1" in line] == [
        (1, 0.3),
        (3, 0.5),
        (4, 0.4),
    ]
    assert flat(state.chosen) == seen[1]
    assert made.memory.saved == [4, 8, 12, 16], "the ends of all epochs but the last, which the stage saves"


def test_after_an_evaluation_training_goes_on_in_training_mode() -> None:
    model = normed()
    watch = Watch(lambda: (model.training, model.get_buffer("1.running_mean").tolist()))
    fit(make(World(), model, hooks=[watch], epochs=3).run, None)
    assert all(training for training, _ in watch.seen) and len({str(mean) for _, mean in watch.seen}) == 12


def test_clipping_bounds_the_update() -> None:
    for bound in (1e-3, None):
        model = mlp()
        before = torch.tensor(flat(model))
        made = make(World(), model, size=10, batch=10, epochs=1, config={"clip_grad_norm": bound, "optim": {"lr": 1.0}})
        fit(made.run, None)
        moved = float((torch.tensor(flat(model)) - before).norm())
        assert moved == pytest.approx(1e-3, rel=1e-3) if bound else moved > 0.1


@pytest.mark.parametrize("stop", [1, 4, 5, 8])
def test_a_resumed_loop_ends_to_the_bit_like_an_undisturbed_one(stop: int) -> None:
    def run() -> tuple[nn.Module, Any]:
        model = mlp(dropout=0.3)
        made = make(
            World(),
            model,
            epochs=3,
            checkpoint_every=1,
            config={"ema_decay": 0.9, "optim": {"name": "adamw", "lr": 0.01}, "schedule": {"warmup": 0.3}},
        )
        return model, made

    model, made = run()
    states = {}
    keep = made.memory.save_step

    def save_step(stage: str, step: int, state: dict[str, Any], best_first: Sequence[int], needed: int | None) -> None:
        keep(stage, step, state, best_first, needed)
        states[step] = made.memory.load_step(stage, step)

    made.run.checkpoints.save_step = save_step
    undisturbed = fit(made.run, None)
    resumed_model, resumed_made = run()
    resumed = fit(resumed_made.run, states[stop])
    assert (
        flat(resumed_model) == flat(model)
        and flat(resumed.chosen) == flat(undisturbed.chosen)
        and resumed.metrics == undisturbed.metrics
    )
    assert resumed_made.recorder.of("loss") == made.recorder.of("loss")[stop:]


def test_a_loop_resumed_just_after_it_stopped_early_does_not_train_on() -> None:
    def run(values: list[float]) -> tuple[nn.Module, Any]:
        model = mlp()
        evaluation, _ = _scored(values, model)
        config = {"early_stopping": {"patience": 2}, "select": "best"}
        return model, make(World(), model, epochs=9, config=config, evaluate_with=evaluation)

    model, made = run([0.5, 0.7, 0.6, 0.7])
    stopped = fit(made.run, None)
    assert stopped.step == 16 and stopped.chosen_step == 8 and stopped.metrics["top1"] == 0.7
    assert made.memory.saved == [4, 8, 12, 16]
    resumed_model, resumed_made = run([])
    resumed_made.memory.states = made.memory.states
    resumed = fit(resumed_made.run, made.memory.load_step("train", 16))
    assert resumed_made.memory.saved == [] and resumed_made.recorder.lines == []
    assert (resumed.step, resumed.chosen_step) == (16, 8) and flat(resumed_model) == flat(model)


def test_the_best_is_chosen_by_any_metric_in_its_own_direction() -> None:
    losses = iter([0.9, 0.2, 0.4])

    def evaluation(chosen: nn.Module) -> Evaluation:
        return Evaluation({"top1": 1.0, "loss": next(losses), "count": 37}, torch.empty(0))

    model = mlp()
    made = make(World(), model, epochs=3, config={"select": "best", "select_by": "loss"}, evaluate_with=evaluation)
    assert fit(made.run, None).metrics["loss"] == 0.2


def test_bf16_autocast_trains_with_float32_parameters() -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        model = mlp()
        made = make(World(), model, epochs=10, precision=precision)
        fit(made.run, None)
        losses[precision] = made.recorder.of("loss")
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert losses["bf16"][-1] < 0.7 * losses["bf16"][0]
    assert losses["bf16"] != losses["fp32"] and losses["bf16"] == pytest.approx(losses["fp32"], abs=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_trains_like_an_eager_one() -> None:
    found = []
    world = World(heartbeat=Heartbeat(timeout=5.0))
    for compile in (False, True):
        model, limits = mlp(), Watch(lambda: world.heartbeat.limit)
        made = make(world, model, micro=4, compile=compile, hooks=[limits])
        state = fit(made.run, None)
        # Compiling must not count as being stuck.
        assert limits.seen == [world.timeout if compile else 5.0] * 4 + [5.0] * 4
        found.append((made.recorder.of("loss"), flat(state.chosen), state.metrics["top1"]))
        assert all("_orig_mod" not in name for name in model.state_dict())
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5) and found[1][1] == pytest.approx(found[0][1], abs=1e-5)
