"""The lists of torch's names are torch's own."""

from __future__ import annotations

import inspect

import torch
from torch.optim import lr_scheduler

from dist_train import registry
from dist_train.registry import torch_names


def test_optimizers_are_those_of_torch() -> None:
    found = {
        name
        for name, each in vars(torch.optim).items()
        if inspect.isclass(each) and issubclass(each, torch.optim.Optimizer) and each is not torch.optim.Optimizer
    }
    assert found == {*torch_names.OPTIMIZERS, *torch_names.REFUSED_OPTIMIZERS}


def test_schedules_are_those_of_torch() -> None:
    found = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert found == {*torch_names.SCHEDULES, *torch_names.REFUSED_SCHEDULES}


def test_each_name_leads_to_its_class() -> None:
    for name in torch_names.OPTIMIZERS:
        assert registry.optimizers.get(name) is getattr(torch.optim, name)
    for name in torch_names.SCHEDULES:
        assert registry.schedules.get(name) is getattr(lr_scheduler, name)
    for names, where in (
        (torch_names.FUSED_OPTIMIZERS, registry.optimizers),
        (torch_names.OWN_SCHEDULES, registry.schedules),
    ):
        for own, name in names.items():
            assert where.get(own) is where.get(name)
