"""Tests parameter groups, fused updates, the moving average and the values of learning rates."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_train.config.fit import OptimConfig, ScheduleConfig
from dist_train.models.small import small_resnet
from dist_train.training.average import MovingAverage
from dist_train.training.optim import build_optimizer
from dist_train.training.schedule import build_schedule


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR warns about its own start
        yield


def rates(config: ScheduleConfig, total: int, per_epoch: int = 10, lr: float = 0.5) -> list[float]:
    """Returns the learning rate of each of `total` steps."""
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimConfig(lr=lr))
    schedule = build_schedule(optimizer, config, total, per_epoch)
    used = []
    for _ in range(total):
        values = {group["lr"] for group in optimizer.param_groups}
        assert len(values) == 1, "groups have one rate"
        used.append(values.pop())
        optimizer.step()
        schedule.step()
    return used


def cosine(done: float, final: float) -> float:
    return 0.5 * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_are_not_decayed(name: str) -> None:
    model = small_resnet(10, 1)
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.01))
    decays = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for place, parameter in model.named_parameters():
        of_norm_or_bias = place.endswith("bias") or isinstance(
            model.get_submodule(place.rpartition(".")[0]), nn.BatchNorm2d
        )
        assert decays[id(parameter)] == (0.0 if of_norm_or_bias else 0.01), place


def test_everything_is_decayed_where_that_is_asked_for() -> None:
    optimizer = build_optimizer(small_resnet(10, 1), OptimConfig(weight_decay=0.01, decay_norm_and_bias=True))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01]


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig())
    assert {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} == {
        id(parameter) for parameter in model[1].parameters()
    }


def test_settings_reach_the_optimizers() -> None:
    sgd = build_optimizer(nn.Linear(1, 1), OptimConfig(lr=0.3, momentum=0.8, nesterov=True))
    assert isinstance(sgd, torch.optim.SGD) and all(
        (group["lr"], group["momentum"], group["nesterov"]) == (0.3, 0.8, True) for group in sgd.param_groups
    )
    adamw = build_optimizer(nn.Linear(1, 1), OptimConfig(name="adamw", lr=0.3, betas=(0.8, 0.95), eps=1e-6))
    assert isinstance(adamw, torch.optim.AdamW) and all(
        (group["lr"], group["betas"], group["eps"]) == (0.3, (0.8, 0.95), 1e-6) for group in adamw.param_groups
    )


def test_constant_stays() -> None:
    assert rates(ScheduleConfig(name="constant"), 5) == [0.5] * 5


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_falls_to_its_final_rate(final: float) -> None:
    assert rates(ScheduleConfig(name="cosine", final=final), 40) == pytest.approx(
        [cosine(step / 40, final) for step in range(40)]
    )


@pytest.mark.parametrize("final", [0.0, 0.2])
def test_linear_falls_to_its_final_rate(final: float) -> None:
    assert rates(ScheduleConfig(name="linear", final=final), 40) == pytest.approx(
        [0.5 * (1 + (final - 1) * step / 40) for step in range(40)]
    )


def test_step_decays_at_the_first_step_of_an_epoch() -> None:
    used = rates(ScheduleConfig(name="step", step_epochs=2, gamma=0.1), 50)
    assert used == pytest.approx([0.5] * 20 + [0.05] * 20 + [0.005] * 10)


def test_step_decays_within_an_epoch_where_its_epochs_are_a_fraction() -> None:
    assert rates(ScheduleConfig(name="step", step_epochs=0.5, gamma=0.5), 11) == pytest.approx(
        [0.5] * 5 + [0.25] * 5 + [0.125]
    )


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "step"])
def test_warm_up_rises_linearly_from_one_percent_and_the_rest_follows_from_the_top(name: str) -> None:
    used = rates(ScheduleConfig.model_validate({"name": name, "warmup": 0.25, "step_epochs": 1}), 40)
    assert used[:10] == pytest.approx([0.5 * (0.01 + 0.99 * step / 10) for step in range(10)])
    rest = {
        "constant": [0.5] * 30,
        "cosine": [cosine(step / 30, 0.0) for step in range(30)],
        "linear": [0.5 * (1 - step / 30) for step in range(30)],
        "step": [0.5] * 10 + [0.05] * 10 + [0.005] * 10,
    }[name]
    assert used[10:] == pytest.approx(rest)


def test_the_number_of_warm_up_steps_does_not_hang_on_the_rounding_of_a_product() -> None:
    # In floating point, 0.29 * 100 is 28.999999999999996.
    assert rates(ScheduleConfig(name="constant", warmup=0.29), 100).index(0.5) == 29


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "step"])
def test_the_shortest_stages_have_rates_too(name: str, warmup: float, total: int) -> None:
    assert all(
        0 < rate <= 0.5 for rate in rates(ScheduleConfig.model_validate({"name": name, "warmup": warmup}), total)
    )


@pytest.mark.parametrize("warmup", [0.0, 0.3])
@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "step"])
@pytest.mark.parametrize("stop", [1, 5, 6, 7, 13])
def test_a_resumed_schedule_goes_on_to_the_bit(name: str, warmup: float, stop: int) -> None:
    config = ScheduleConfig.model_validate({"name": name, "warmup": warmup, "final": 0.05, "step_epochs": 0.4})
    undisturbed = rates(config, 20)
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimConfig(lr=0.5))
    schedule = build_schedule(optimizer, config, 20, 10)
    for _ in range(stop):
        optimizer.step()
        schedule.step()
    resumed_optimizer = build_optimizer(model, OptimConfig(lr=0.5))
    resumed = build_schedule(resumed_optimizer, config, 20, 10)
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    used = []
    for _ in range(20 - stop):
        used.append(resumed_optimizer.param_groups[0]["lr"])
        resumed_optimizer.step()
        resumed.step()
    assert used == undisturbed[stop:]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_gradients_in_another_layout_than_their_parameter_update_the_right_elements(name: str) -> None:
    settings = OptimConfig(name=name, lr=0.1)
    gradient = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for fused in (True, False):
        model = nn.Conv2d(3, 4, 5, bias=False).to(memory_format=torch.channels_last)
        with torch.no_grad():
            model.weight.copy_(torch.ones_like(gradient))
        optimizer = build_optimizer(model, settings, fused=fused)
        model.weight.grad = gradient.clone()
        optimizer.step()
        found.append(model.weight.detach().clone())
    torch.testing.assert_close(*found)


def test_sparse_gradients_that_no_module_tells_of_are_applied() -> None:
    model = nn.Module()
    model.table = nn.Parameter(torch.ones(4, 3))
    optimizer = build_optimizer(model, OptimConfig(name="sgd", lr=0.5, momentum=0.0, weight_decay=0.0))
    nn.functional.embedding(torch.tensor([1, 1, 2]), model.table, sparse=True).sum().backward()
    optimizer.step()
    assert model.table[:, 0].tolist() == [1.0, 0.0, 0.5, 1.0]


def test_a_parameter_that_is_used_late_gets_its_momentum() -> None:
    """torch's fused SGD raises a TypeError where some momenta are there and others are not."""
    found = []
    for fused in (True, False):
        model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False))
        optimizer = build_optimizer(model, OptimConfig(name="sgd", lr=0.1), fused=fused)
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        for used in ([0], [0, 1], [1], [0, 1]):
            for index in (0, 1):
                model[index].weight.grad = torch.full((2, 3), 0.5) if index in used else None
            optimizer.step()
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    torch.testing.assert_close(*found)


def test_models_that_fused_kernels_do_not_take_are_trained_without_them() -> None:
    sparse = nn.Embedding(4, 3, sparse=True)
    overlapping = nn.Module()
    overlapping.weight = nn.Parameter(torch.ones(1, 3).expand(2, 3))
    others = [nn.Linear(2, 2, dtype=dtype) for dtype in (torch.complex64, torch.bfloat16, torch.float16)]
    for model in (sparse, overlapping, *others):
        assert not build_optimizer(model, OptimConfig(name="sgd", lr=0.1)).defaults["fused"]
    assert build_optimizer(nn.Linear(2, 2), OptimConfig(name="sgd", lr=0.1)).defaults["fused"]


def test_the_moving_average_is_that_of_torch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ours = MovingAverage(copy.deepcopy(model), 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        model(torch.randn(8, 3))
        if step == 3:  # as after a resume
            resumed = MovingAverage(copy.deepcopy(model), 0.9)
            resumed.load_state_dict(ours.state_dict())
            ours = resumed
        ours.update_parameters(model)
        theirs.update_parameters(model)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
