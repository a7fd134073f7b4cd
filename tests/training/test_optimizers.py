"""Tests torch's optimizers by name, registered ones, parameter groups, and their exact resumption."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import dist_train
from dist_train.config.fit import GroupConfig, OptimConfig
from dist_train.config.stages import TrainConfig
from dist_train.config.tree import Config
from dist_train.errors import ConfigError, SetupError
from dist_train.registry.torch_names import FUSED_OPTIMIZERS, OPTIMIZERS
from dist_train.run_dir.state_codec import decode, encode
from dist_train.training.optim import build_optimizer
from dist_train.training.optim_arguments import check_optim_and_schedule
from dist_train.training.selection import Selection
from dist_train.training.state import TrainState

HEAD = frozenset({"1.weight", "1.bias"})


def net(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias), nn.Linear(4, 3, bias))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 6).view(2, 3) * (step + 1)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", [*OPTIMIZERS, *FUSED_OPTIMIZERS])
def test_each_goes_on_to_the_bit_with_its_groups(name: str) -> None:
    bias = name != "Muon"  # which takes matrices alone
    config = OptimConfig(name=name, lr=0.01, weight_decay=0.0, groups=[GroupConfig(match="1", lr=0.001)])

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net(bias)
        return model, build_optimizer(model, config, groups=[HEAD])

    model, optimizer = make()
    steps(model, optimizer, 0, 3)
    kept = copy.deepcopy(decode(*encode([model.state_dict(), optimizer.state_dict()])))
    steps(model, optimizer, 3, 6)
    resumed, other = make()
    resumed.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    rates = {id(each): group["lr"] for group in other.param_groups for each in group["params"]}
    assert all(rates[id(each)] == (0.001 if place in HEAD else 0.01) for place, each in resumed.named_parameters())
    steps(resumed, other, 3, 6)
    for mine, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs)


MUON = OptimConfig(
    name="Muon",
    lr=0.02,
    weight_decay=0.1,
    args={"ns_steps": 3},
    groups=[GroupConfig(match="*.bias", name="adamw", lr=0.001, args={"betas": [0.8, 0.9]})],
)
BIASES = frozenset({"0.bias", "1.bias"})


def test_groups_with_another_optimizer_step_as_it_does_and_go_on_to_the_bit() -> None:
    model, same = net(), net()
    optimizer = build_optimizer(model, MUON, groups=[BIASES])
    matrices, biases = ([each for each in same.parameters() if each.dim() == dims] for dims in (2, 1))
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, ns_steps=3)
    adamw = torch.optim.AdamW(biases, lr=0.001, betas=(0.8, 0.9), weight_decay=0.0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.001]
    for step in range(6):
        if step == 3:
            kept = copy.deepcopy(decode(*encode([model.state_dict(), optimizer.state_dict()])))
            model = net()
            optimizer = build_optimizer(model, MUON, groups=[BIASES])
            model.load_state_dict(kept[0])
            optimizer.load_state_dict(kept[1])
        steps(model, optimizer, step, step + 1)
        same.zero_grad()
        same(torch.linspace(-1, 1, 6).view(2, 3) * (step + 1)).square().sum().backward()
        muon.step()
        adamw.step()
    for mine, theirs in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_arguments_of_a_group_are_those_of_its_own_optimizer() -> None:
    wrong = {"match": "a", "name": "adamw", "args": {"ns_steps": 2}}
    found = problems(train={"optim": {"name": "Muon", "groups": [wrong]}})
    assert found[0].startswith("train.optim.groups.0.args.ns_steps: adamw has no setting 'ns_steps' of a group"), found
    assert (
        "train.optim.groups.0.args"
        in problems(train={"optim": {"name": "Muon", "groups": [{**wrong, "args": {"betas": [2, 2]}}]}})[0]
    )


def test_a_name_in_capitals_is_torchs_with_torchs_defaults() -> None:
    model, same = net(), net()
    mine = build_optimizer(model, OptimConfig(name="RMSprop", lr=0.01, args={"alpha": 0.9, "centered": True}))
    theirs = torch.optim.RMSprop(same.parameters(), lr=0.01, alpha=0.9, centered=True)
    steps(model, mine, 0, 4)
    steps(same, theirs, 0, 4)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), same.parameters(), strict=True))
    assert build_optimizer(net(), OptimConfig(name="SGD")).defaults["momentum"] == 0
    assert build_optimizer(net(), OptimConfig(name="sgd")).defaults["momentum"] == 0.9


def settings_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, tuple[float, float]]:
    found = {
        id(each): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for each in group["params"]
    }
    return {name: found[id(each)] for name, each in model.named_parameters()}


@pytest.mark.parametrize("name", ["sgd", "AdamW"])
def test_groups_override_and_keep_the_rule_of_norms_and_biases(name: str) -> None:
    model = net()
    groups = [GroupConfig(match="1", lr=0.01, weight_decay=0.3)]
    config = OptimConfig(name=name, lr=0.1, weight_decay=0.2, groups=groups)
    assert settings_of(build_optimizer(model, config, groups=[HEAD]), model) == {
        "0.weight": (0.1, 0.2),
        "0.bias": (0.1, 0.0),
        "1.weight": (0.01, 0.3),
        "1.bias": (0.01, 0.0),
    }
    both = groups[0].model_copy(update={"decay_norm_and_bias": True})
    config = config.model_copy(update={"groups": [both]})
    assert settings_of(build_optimizer(model, config, groups=[HEAD]), model)["1.bias"] == (0.01, 0.3)


def test_the_base_rate_and_those_of_groups_are_scaled_to_the_batch_alike() -> None:
    config = OptimConfig(lr=0.1, base_batch_size=32, groups=[GroupConfig(match="1", lr=0.01), GroupConfig(match="0")])
    scaled = config.scaled(64)
    assert (scaled.lr, [group.lr for group in scaled.groups]) == (0.2, [0.02, None])


def test_other_settings_of_a_group() -> None:
    config = OptimConfig(name="adamw", groups=[GroupConfig(match="1", args={"betas": [0.5, 0.6]})])
    made = build_optimizer(net(), config, groups=[HEAD])
    assert [group["betas"] for group in made.param_groups] == [(0.9, 0.999)] * 2 + [(0.5, 0.6)] * 2


@dist_train.register_optimizer("signs")
class Signs(torch.optim.Optimizer):
    """Steps by the signs of the gradients."""

    def __init__(self, params: Any, lr: float, shrink: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "shrink": shrink, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"] * group["shrink"])


@dist_train.register_optimizer("forgetful")
def forgetful(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params[:1], lr=lr)


def test_a_registered_optimizer_gets_groups_and_its_arguments() -> None:
    model = net()
    config = OptimConfig(name="signs", lr=0.1, args={"shrink": 0.5}, groups=[GroupConfig(match="1", lr=0.01)])
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = build_optimizer(model, config, groups=[HEAD])
    steps(model, optimizer, 0, 1)
    moved = [float((one - two).abs().max()) for one, two in zip(before, model.parameters(), strict=True)]
    assert moved == pytest.approx([0.05, 0.05, 0.005, 0.005])
    with pytest.raises(SetupError, match="has 2 parameters, not the 4 that it got"):
        build_optimizer(model, OptimConfig(name="forgetful"))


def problems(**sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_optim_and_schedule(Config.model_validate({"stages": list(sections), **sections}))
    return [f"{each.place}: {each.message} -> {each.hint}" for each in caught.value.problems]


def _of_a_group(name: str, **args: Any) -> dict[str, Any]:
    return {"name": name, "groups": [{"match": "*", "args": args}]}


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ({"name": "RAdam", "args": {"beta": [0.9, 0.99]}}, "train.optim.args.beta: RAdam takes no 'beta' -> did you"),
        ({"name": "RAdam", "args": {"betas": [1.9, 0.99]}}, "train.optim.args: the optimizer RAdam cannot be made:"),
        ({"name": "SGD", "args": {"lr": 0.1}}, "train.optim.args.lr: is not given here -> take optim.lr"),
        ({"name": "AdamW", "args": {"fused": True}}, "train.optim.args.fused: is not given here -> take optim.name"),
        ({"name": "Rprop", "weight_decay": 0.1}, "train.optim.weight_decay: is ignored by Rprop"),
        (
            {"name": "sgd", "groups": [{"match": "*", "args": {"momentums": 0.1}}]},
            "train.optim.groups.0.args.momentums: sgd has no setting 'momentums' of a group -> did you mean momentum",
        ),
        ({"name": "RAdam", "args": {"betas": [0.9]}}, "train.optim.args: the optimizer RAdam cannot be made: "),
        (_of_a_group("adamw", betas=[5, 0.9]), "train.optim.groups.0.args: adamw does not take them: Invalid beta"),
        (_of_a_group("AdamW", betas=3), "train.optim.groups.0.args: AdamW does not take them: "),
        (_of_a_group("SGD", momentum="x"), "train.optim.groups.0.args: SGD does not take them: "),
        (_of_a_group("sgd", dampening="x"), "train.optim.groups.0.args: sgd does not take them: "),
    ],
)  # fmt: skip
def test_wrong_arguments_of_optimizers_are_refused(optim: dict[str, Any], expected: str) -> None:
    (found,) = problems(train={"optim": optim})
    assert found.startswith(expected), found


@pytest.mark.parametrize(
    ("optim", "schedule", "expected"),
    [
        ({}, {"name": "StepLR", "args": {"gama": 0.5}}, "qat.schedule.args.gama: StepLR takes no 'gama' -> did"),
        ({}, {"name": "StepLR"}, "qat.schedule.args: the schedule StepLR cannot be made"),
        ({}, {"name": "StepLR", "args": {"last_epoch": 3}}, "qat.schedule.args.last_epoch: is not given here"),
        ({"name": "Adagrad"}, {"name": "OneCycleLR"}, "qat.schedule.args: the schedule OneCycleLR cannot be made"),
        ({}, {"name": "MultiStepLR", "args": {"milestones": 3}}, "qat.schedule.args: the schedule MultiStepLR cannot"),
        ({}, {"name": "StepLR", "args": {"step_size": 0}}, "qat.schedule.args: the schedule StepLR cannot be made"),
        ({}, {"name": "StepLR", "args": {"step_size": "x"}}, "qat.schedule.args: the schedule StepLR cannot be made"),
        (
            {},
            {"name": "ReduceLROnPlateau", "args": {"patience": "x"}},
            "qat.schedule.args: the schedule ReduceLROnPlateau cannot be made",
        ),
        (
            {},
            {"name": "ExponentialLR", "args": {"gamma": -1}},
            "qat.schedule.args: the schedule ExponentialLR cannot be made: it gives the learning rate -0.001",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_of_schedules_are_refused(
    optim: dict[str, Any], schedule: dict[str, Any], expected: str
) -> None:
    (found,) = problems(qat={"optim": optim, "schedule": schedule})
    assert found.startswith(expected), found


def test_right_arguments_pass() -> None:
    for name in OPTIMIZERS:
        check_optim_and_schedule(Config.model_validate({"train": {"optim": {"name": name}}}))
    schedule = {"name": "OneCycleLR", "args": {"total_steps": 5}}
    check_optim_and_schedule(Config.model_validate({"train": {"schedule": schedule}}))


@dist_train.register_optimizer("counting_for_test")
class Counting(torch.optim.SGD):
    """Keeps a number of its own beside the states of parameters."""

    def step(self, closure: Any = None) -> Any:
        self.state["steps"] = self.state.get("steps", 0) + 1
        return super().step(closure)


def test_a_state_that_is_of_no_parameter_is_loaded_as_it_is() -> None:
    def make() -> TrainState:
        fit = TrainConfig.model_validate({"optim": {"name": "counting_for_test", "lr": 0.01}})
        return TrainState(net(), fit, 6, 3, Selection(fit, "loss", {"loss"}), torch.amp.GradScaler(enabled=False))

    state, resumed = make(), make()
    steps(state.model, state.optimizer, 0, 2)
    resumed.load_state_dict(decode(*encode(state.state_dict())))
    assert resumed.optimizer.state["steps"] == 2
