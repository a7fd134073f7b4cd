"""A moving average is evaluated, saved and handed on with its own statistics; training keeps the model's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.data.arrays import Batch
from dist_train.distributed.world import World
from dist_train.models.batch_norm import running_statistics
from dist_train.training.loop import fit
from dist_train.training.recalibration import estimate_moments
from tests.support.small_runs import Runs
from tests.support.training_loops import Made, arrays, flat, make

SETTINGS = {"ema_decay": 0.8, "evaluate_every": 2}


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))


def recalibrate(averaged: nn.Module) -> None:
    data = arrays(24)
    inputs = (data.images.float() / 255 - 0.5) / 0.25
    estimate_moments(averaged, [Batch(torch.arange(24), inputs, data.targets)], World())


def statistics(model: nn.Module) -> list[float]:
    return torch.cat([buffer.flatten() for buffer in running_statistics(model)]).tolist()


def made(model: nn.Module, **options: Any) -> Made:
    return make(World(), model, epochs=4, config={**SETTINGS, **options.pop("config", {})}, **options)


def test_what_is_handed_on_has_the_moments_of_the_averaged_parameters() -> None:
    model = net()
    state = fit(made(model, recalibrate=recalibrate).run, None)
    expected = copy.deepcopy(state.chosen)
    recalibrate(expected)
    assert statistics(state.chosen) == pytest.approx(statistics(expected), rel=1e-6)
    assert statistics(state.chosen) != pytest.approx(statistics(model), rel=1e-2)
    untouched = net()
    fit(made(untouched).run, None)
    assert flat(untouched) == flat(model) and statistics(untouched) == statistics(model), "training knows nothing of it"


@pytest.mark.parametrize("select", ["last", pytest.param("best", marks=pytest.mark.slow)])
def test_a_resumed_run_has_the_same_ones_to_the_bit(select: str) -> None:
    config = {"select": select, "optim": {"lr": 2.0}}
    model, kept = net(), {}
    undisturbed = made(model, recalibrate=recalibrate, config=config, checkpoint_every=3)
    save = undisturbed.memory.save_step

    def keep(stage: str, step: int, state: dict[str, Any], best_first: Sequence[int], needed: int | None) -> None:
        save(stage, step, state, best_first, needed)
        kept[step] = copy.deepcopy(undisturbed.memory.states)

    undisturbed.memory.save_step = keep  # type: ignore[method-assign]
    state = fit(undisturbed.run, None)
    assert len(kept) > 4
    for step, states in kept.items():
        again = net()
        resumed = made(again, recalibrate=recalibrate, config=config, checkpoint_every=3)
        resumed.memory.states = states
        found = fit(resumed.run, copy.deepcopy(states[step]))
        assert statistics(found.chosen) == statistics(state.chosen) and flat(found.chosen) == flat(state.chosen), step
        assert found.chosen_step == state.chosen_step and found.metrics == state.metrics


QAT = [
    "--stages",
    "[train,qat]",
    "--train.epochs",
    "1",
    "--qat.epochs",
    "1",
    "--qat.ema_decay",
    "0.5",
    "--model.name",
    "small_resnet",
]


@pytest.mark.slow
def test_in_qat_what_is_frozen_is_kept_and_what_is_learned_is_estimated_anew(tmp_path: Path) -> None:
    runs, found = Runs(tmp_path), {}
    for frozen in ("0", "1"):
        for samples in ("40", "200"):
            name, freeze = f"{frozen}-{samples}", ["--qat.freeze_batch_norm", frozen, "--qat.freeze_ranges", frozen]
            size = ["--model.args", "{width: 4, blocks: 1}", "--qat.ema_samples", samples]
            assert runs(name, *QAT, *freeze, *size) == 0
            found[name] = runs.product(name, "qat")
    assert found["0-40"] == found["0-200"], "frozen from the first step: nothing is estimated"
    different = {key for key in found["1-40"] if found["1-40"][key] != found["1-200"][key]}
    kinds = {key.rpartition(".")[2] for key in different}
    assert {"running_mean", "running_var", "scale"} <= kinds and not kinds & {"weight", "bias"}, different
