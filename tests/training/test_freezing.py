"""Tests frozen parts of a model: no gradient, statistics that stay, unfreezing at an epoch, exact resumption."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.config.tree import Config
from dist_train.data.arrays import Batch
from dist_train.distributed.world import World
from dist_train.models.batch_norm import batch_moments, hold_batch_norms
from dist_train.quantization.backend import build_backend
from dist_train.training.freezing import Freezing
from dist_train.training.loop import fit
from dist_train.training.parts import Parts, float_names, resolve_parts
from dist_train.training.recalibration import estimate_moments
from tests.support.one_net_all_backends import StubNet
from tests.support.tiny_nets import calibrate
from tests.support.training_loops import CLASSES, Made, Watch, make


def net() -> nn.Module:
    """A body with a batch norm, a batch norm of its own, and a head."""
    torch.manual_seed(1)
    body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    return nn.Sequential(body, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, CLASSES))


def freezing_run(
    model: nn.Module, unfreeze_at: int | None, epochs: int = 3, world: World | None = None, **settings: Any
) -> Made:
    """A run in which module 0, the body, is frozen."""
    train = {"freeze": ["0"], "unfreeze_at": unfreeze_at, **settings}
    made = make(world or World(), model, epochs=epochs, config=train, checkpoint_every=3)
    learner = made.run.learner
    learner.parts = resolve_parts(Config.model_validate({"train": train}), "train", model)
    learner.freezing = Freezing(model, learner.reduction, learner.parts, {}, unfreeze_at)
    return made


def body(model: nn.Module) -> list[torch.Tensor]:
    return [each.detach().clone() for each in model[0].state_dict().values()]  # type: ignore[index]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(left, right, strict=True))


def test_a_frozen_part_keeps_every_bit_and_the_rest_learns() -> None:
    model = net()
    before, head = body(model), model[4].weight.detach().clone()  # type: ignore[index]
    watch = Watch(lambda: model[0][1].training)  # type: ignore[index]
    made = freezing_run(model, None, ema_decay=0.9, optim={"lr": 0.1, "weight_decay": 0.1})
    made.run.learner._hooks = [watch]  # type: ignore[attr-defined]
    made.run.learner.freezing.enter(0)
    state = fit(made.run, None)
    assert equal(before, body(model)) and not torch.equal(head, model[4].weight)  # type: ignore[index]
    assert equal(before[:2], body(state.chosen)[:2]), "the average of equal values"
    assert watch.seen and not any(watch.seen), "a train() wakes the batch norm up"
    learned = {id(each) for each in state.parameters}
    assert not learned & {id(each) for each in model[0].parameters()}  # type: ignore[index]
    assert int(model[2].num_batches_tracked) == made.run.total_steps  # type: ignore[index]


def test_unfrozen_at_an_epoch_it_learns_from_there() -> None:
    model = net()
    before, seen = body(model), list[bool]()
    made = freezing_run(model, 1)
    made.run.learner._hooks = [Watch(lambda: seen.append(equal(before, body(model))))]  # type: ignore[attr-defined]
    fit(made.run, None)
    steps = made.run.steps_per_epoch
    assert seen == [True] * (steps + 1) + [False] * (2 * steps - 1)
    assert model[0][1].num_batches_tracked == 2 * steps  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["sgd", "adamw", "NAdam"])
@pytest.mark.parametrize("unfreeze_at", [None, 1])
def test_resumed_anywhere_it_ends_with_the_same_bytes(optim: str, unfreeze_at: int | None) -> None:
    settings = {"optim": {"name": optim, "lr": 0.05}, "schedule": {"name": "OneCycleLR"}, "ema_decay": 0.8}

    def run() -> tuple[nn.Module, Made]:
        model = net()
        made = freezing_run(model, unfreeze_at, **settings)
        if unfreeze_at is None:
            made.run.learner.freezing.enter(0)
        return model, made

    model, made = run()
    states = dict[int, dict[str, Any]]()
    keep = made.memory.save_step

    def save_step(stage: str, step: int, state: dict[str, Any], *rest: Any) -> None:
        states[step] = copy.deepcopy(state)
        keep(stage, step, state, *rest)

    made.memory.save_step = save_step  # type: ignore[method-assign]
    average = fit(made.run, None).chosen
    assert {3, 4, 6} <= states.keys(), "within the frozen epoch, at its end, and after it"
    for step, state in states.items():
        other, again = run()
        resumed = fit(again.run, state).chosen
        for left, right in ((model, other), (average, resumed)):
            assert equal(list(left.state_dict().values()), list(right.state_dict().values())), step


def test_released_it_is_as_before() -> None:
    model = net()
    freezing = freezing_run(model, None).run.learner.freezing
    assert freezing.enter(0) and not freezing.enter(5)
    copied = copy.deepcopy(model)
    assert not copied.train()[0][1].training and copied[0][1].__dict__["train"].args[0] is copied[0][1]  # type: ignore[index]
    freezing.release()
    assert all(each.requires_grad for each in model.parameters())
    assert model.train()[0][1].training and "train" not in model[0][1].__dict__  # type: ignore[index]


def test_what_did_not_learn_before_does_not_learn_after() -> None:
    model = net()
    model[0][0].bias.requires_grad_(False)  # type: ignore[index]
    freezing = freezing_run(model, 1).run.learner.freezing
    freezing.enter(0)
    freezing.enter(1)
    assert not model[0][0].bias.requires_grad and model[0][0].weight.requires_grad  # type: ignore[index]


def test_estimating_moments_leaves_frozen_statistics() -> None:
    model = net()
    hold_batch_norms(model, ["0.1"])
    before = [each.clone() for each in model[0][1].buffers()]  # type: ignore[index]
    other = model[2].running_mean.clone()  # type: ignore[index]
    batches = [
        Batch(ids=torch.arange(size), inputs=torch.rand(size, 1, 4, 4), targets=torch.zeros(size, dtype=torch.int64))
        for size in (7, 3, 5)
    ]
    estimate_moments(model, batches, World())
    assert equal(before, list(model[0][1].buffers())) and not torch.equal(other, model[2].running_mean)  # type: ignore[index]
    with batch_moments(model):
        assert not model[0][1].training and model[2].training  # type: ignore[index]


@pytest.mark.heavy
@pytest.mark.parametrize("backend", ["pt2e", "fx", "eager"])
def test_a_batch_norm_frozen_in_qat_keeps_its_statistics_until_it_is_released(backend: str) -> None:
    torch.manual_seed(0)
    x = torch.rand(8, 3, 8, 8)
    settings = Config.model_validate({"qat": {"backend": backend, "freeze": ["bn1", "conv1"]}})
    model = StubNet().eval()
    prepared = calibrate(build_backend(settings.qat).prepare(model, x), x)
    parts, names = resolve_parts(settings, "qat", model), float_names(prepared, model)

    class NoReduction:
        left_out: list[str] = []

        def leave_out(self, names: list[str]) -> None:
            self.left_out = names

    reduction = NoReduction()
    freezing = Freezing(prepared, reduction, parts, names, None)  # type: ignore[arg-type]
    freezing.enter(0)
    assert reduction.left_out == [prepared.batch_norms["bn1"]]
    copied = copy.deepcopy(prepared)
    for each in (prepared, copied):
        frozen, free = (each.get_submodule(prepared.batch_norms[name]) for name in ("bn1", "bn2"))
        before = [tensor.clone() for tensor in (*frozen.buffers(), *free.buffers())]
        outputs = each.train()(x)
        outputs.sum().backward()
        now = [*frozen.buffers(), *free.buffers()]
        assert equal(before[:3], now[:3]), "a forward in training changed frozen statistics"
        assert not equal(before[3:5], now[3:5])
        with each.batch_moments():
            each(x)
        assert equal(before[:3], list(frozen.buffers()))
        learning = {names[name] for name, parameter in each.named_parameters() if parameter.grad is not None}
        assert learning == {"conv2.weight", "conv2.bias", "bn2.weight", "bn2.bias", "fc.weight", "fc.bias"}
        # Normalized by the running statistics: as in evaluation.
        first = prepared.batch_norms["bn1"]
        assert torch.isfinite(outputs).all() and first
    freezing.release()
    frozen = prepared.get_submodule(prepared.batch_norms["bn1"])
    before = [tensor.clone() for tensor in frozen.buffers()]
    prepared.train()(x)
    assert not equal(before, list(frozen.buffers()))


def test_parts_without_patterns_freeze_nothing() -> None:
    model = net()
    freezing = Freezing(model, None, Parts(), {}, None)  # type: ignore[arg-type]
    assert not len(freezing) and not freezing.enter(0) and all(each.requires_grad for each in model.parameters())
