"""Checkpoints as timm, Lightning and others lay them out: what is taken is said, what does not match is listed."""

from __future__ import annotations

import argparse
import datetime
import enum
import functools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_train.errors import DataError
from dist_train.models.weight_files import read_file
from dist_train.models.weights import load_weights


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)


class Kind(enum.Enum):
    SMALL = 1


class Parameters(dict[str, Any]):
    """As Lightning's AttributeDict and mmengine's ConfigDict: a dict of a class of its own."""


class Names(list[str]):
    """A list of a class of its own."""


STATE, OTHER = Net().state_dict(), Net().state_dict()
OPTIMIZERS = [{"state": {0: {"exp_avg": torch.zeros(4, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}]


def _named(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def _averaged_by_torch() -> dict[str, Tensor]:
    """As the state_dict of torch.optim.swa_utils.AveragedModel."""
    return _named("module.") | {"n_averaged": torch.tensor(3)}


def lightning(state: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": OrderedDict(state),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.3)}},
        "optimizer_states": OPTIMIZERS,
        "lr_schedulers": [{"last_epoch": 3}],
        "MixedPrecision": {"scale": 65536.0},
        "hparams_name": "config",
        "hyper_parameters": Parameters(
            lr=0.1,
            nested=Parameters(classes=Names(["a", "b"]), one=Names(["c"])),
            kind=Kind.SMALL,
            path=Path("data"),
            began=datetime.datetime(2026, 1, 1),
            activation=functools.partial(nn.ReLU, inplace=True),
            model=nn.Linear(1, 1),
            args=argparse.Namespace(a=1),
        ),
    }


LAYOUTS: dict[str, Any] = {
    "lightning": lightning(_named("model.")),
    "lightning, net": lightning(_named("net.")),
    "lightning, compiled": lightning(_named("model._orig_mod.")),
    "lightning, with metrics and a loss": lightning(
        _named("net.") | {"criterion.weight": torch.ones(2), "train_acc.tp": torch.tensor(3)}
    ),
    "timm": {
        "epoch": 9,
        "arch": "resnet18",
        "state_dict": STATE,
        "optimizer": OPTIMIZERS[0],
        "version": 2,
        "args": argparse.Namespace(lr=0.1),
        "amp_scaler": {"scale": 1.0},
        "metric": 71.2,
    },
    "torchvision's references": {
        "model": _named("module."),
        "optimizer": OPTIMIZERS[0],
        "lr_scheduler": {},
        "epoch": 1,
    },
    "the tutorial": {"epoch": 1, "model_state_dict": STATE, "optimizer_state_dict": OPTIMIZERS[0], "loss": 0.1},
    "ddp of a compiled model": {"model": _named("module._orig_mod.")},
    "an average": {"ema_state_dict": _named("module.")},
    "deepspeed": {"module": STATE, "optimizer": None, "ds_config": {"a": 1}},
    "moco": {"arch": "resnet18", "state_dict": _named("module.encoder_q.") | {"module.queue": torch.zeros(3, 4)}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_are_found_in_the_layouts_of_others(layout: str, tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout], tmp_path / "w.ckpt")
    model = Net()
    load_weights(model, read_file(tmp_path / "w.ckpt"), "w.ckpt", 2)
    assert all(torch.equal(value, STATE[key]) for key, value in model.state_dict().items())


AVERAGED: dict[str, tuple[Any, str, str]] = {
    "timm": (
        {"state_dict": OTHER, "state_dict_ema": STATE, "args": argparse.Namespace()},
        "state_dict_ema",
        "state_dict",
    ),
    "torchvision's references": ({"model": OTHER, "model_ema": _averaged_by_torch(), "epoch": 3}, "model_ema", "model"),
    "ema_state_dict": (
        {"model_state_dict": OTHER, "ema_state_dict": STATE},
        "ema_state_dict",
        "model_state_dict",
    ),
    "swa": ({"model": _named("module.", OTHER), "swa_model": STATE}, "swa_model", "model"),
    "nested": ({"checkpoint": {"net": OTHER, "netEMA": STATE}}, "checkpoint.netEMA", "checkpoint.net"),
    "one state_dict": (lightning(_named("model.", OTHER) | _named("model_ema.")), "model_ema", "model"),
}


@pytest.mark.parametrize("layout", AVERAGED)
def test_of_a_model_and_its_average_the_average_is_taken_and_said(layout: str, tmp_path: Path) -> None:
    content, average, other = AVERAGED[layout]
    torch.save(content, tmp_path / "w.pth")
    for key, wanted in ((None, STATE), (average, STATE), (other, OTHER)):
        model = Net()
        notes = load_weights(model, read_file(tmp_path / "w.pth", key), "w.pth", 2)
        assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
        said = f"the moving average {average} was taken; for the model itself: --model.weights_key {other}"
        assert (said in notes) == (key is None), notes


NOT_AVERAGED: dict[str, Any] = {
    "two averages": {"model": OTHER, "model_ema": STATE, "model_swa": STATE},
    "two models": {"generator": OTHER, "critic": OTHER, "generator_ema": STATE},
    "an average of the parameters alone": {
        "model": OTHER,
        "ema": {key: value for key, value in STATE.items() if "running" not in key},
    },
    "an average of another shape": {"model": OTHER, "ema": STATE | {"head.bias": torch.zeros(5)}},
    "a teacher": {"student": OTHER, "teacher": STATE},
    "a teacher beside the usual name": {"model": OTHER, "teacher": STATE},
}


@pytest.mark.parametrize("layout", NOT_AVERAGED)
def test_where_no_average_is_that_of_the_one_model_a_key_is_asked_for(layout: str, tmp_path: Path) -> None:
    torch.save(NOT_AVERAGED[layout], tmp_path / "w.pth")
    with pytest.raises(DataError, match="several sets of weights") as caught:
        read_file(tmp_path / "w.pth")
    assert all(f"--model.weights_key {key}" in caught.value.hint for key in NOT_AVERAGED[layout])


def test_a_name_with_ema_inside_a_word_is_no_average(tmp_path: Path) -> None:
    torch.save({"model": STATE, "semantic_head": {"weight": torch.ones(2)}}, tmp_path / "w.pth")
    assert read_file(tmp_path / "w.pth").notes == ("of what it holds, model was taken, semantic_head left out",)


def test_lightnings_weight_averaging_keeps_the_average_under_the_usual_name(tmp_path: Path) -> None:
    content = lightning(_named("model."))
    content |= {"current_model_state": _named("model.", OTHER), "averaging_state": {"n_averaged": torch.tensor(3)}}
    torch.save(content, tmp_path / "w.ckpt")
    model = Net()
    notes = load_weights(model, read_file(tmp_path / "w.ckpt"), "w.ckpt", 2)
    assert all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())
    assert any("state_dict was taken" in note and "current_model_state" in note for note in notes)


def test_what_does_not_match_is_listed(tmp_path: Path) -> None:
    changed = {key: value for key, value in STATE.items() if key != "head.bias"} | {"neck.weight": torch.ones(2)}
    save_file(changed, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"is of another model: it lacks head.bias and has besides neck.weight"):
        load_weights(Net(), read_file(tmp_path / "w.safetensors"), "w", 2)
    torch.save(STATE | {"body.0.weight": torch.ones(4, 5), "body.0.bias": torch.ones(3)}, tmp_path / "w.pt")
    with pytest.raises(
        DataError, match=r"body.0.weight is \[4, 5\] there, \[4, 3\] in the model; body.0.bias is \[3\]"
    ):
        load_weights(Net(), read_file(tmp_path / "w.pt"), "w", 2)


def test_weights_of_which_nothing_matches_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"encoder.weight": torch.ones(2, 2)}}, tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"lacks body.0.weight, .* and has besides encoder.weight"):
        load_weights(Net(), read_file(tmp_path / "w.pt"), "w", 2)
