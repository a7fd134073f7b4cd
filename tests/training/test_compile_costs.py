"""The estimate of `compile: auto` is made of counts: it is the same each time, and leaves the model alone."""

from __future__ import annotations

import copy

import torch
from torch import nn

from dist_train.config.stages import QATConfig, TrainConfig
from dist_train.stages.compilation import _graphs
from dist_train.training.compile_costs import Work, work_of


def net() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(256, 3)]
    return nn.Sequential(*parts)


def test_it_counts_what_is_fused_and_changes_nothing() -> None:
    model = net().eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = [work_of(model, torch.zeros(rows, 1, 8, 8)) for rows in (5, 7)]
    # BatchNorm and ReLU write 4 * 64 elements for each row, dropout once to thrice that; convolution and linear layer
    # are not fused.
    assert found[0] == Work(found[1].operators, found[1].per_row, found[0].fixed)
    assert 2 * 256 < found[0].per_row <= 6 * 256 and found[0].fixed <= 16
    assert not model.training and not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random, torch.get_rng_state())


def test_more_rows_save_more_and_more_threads_less() -> None:
    work = Work(operators=50, per_row=100_000.0, fixed=10)
    assert work.saved_seconds(64, "cpu", 1) > work.saved_seconds(32, "cpu", 1) > work.saved_seconds(32, "cpu", 4) > 0
    assert work.saved_seconds(64, "cuda", 1) == work.saved_seconds(64, "cuda", 8) < work.saved_seconds(64, "cpu", 8)
    assert work.compile_seconds(3) == 3 * work.compile_seconds(1)


def test_qat_has_a_graph_for_each_state_of_freezing() -> None:
    assert _graphs(TrainConfig(), 100) == 1
    assert _graphs(QATConfig(), 100) == 3
    assert _graphs(QATConfig(freeze_batch_norm=0.5, freeze_ranges=0.5), 100) == 2
    assert _graphs(QATConfig(freeze_batch_norm=1.0, freeze_ranges=0.0), 100) == 1
