"""Weights out of files that other programs wrote: taken where there is no doubt, else refused with what is in them."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_train.config.data import ModelConfig, is_weights_file
from dist_train.config.tree import Config
from dist_train.errors import ConfigError, DataError
from dist_train.models.weight_files import read_file
from dist_train.models.weights import load_weights
from dist_train.pipeline.arguments import check_arguments


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)


class Inner(nn.Module):
    """The same network behind an attribute, as torchvision's segmentation models are here."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(seed=5)


STATE, OTHER = Net(1).state_dict(), Net(2).state_dict()
OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
RAN: list[str] = []


class Calls:
    """Would call a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments

    def __reduce__(self) -> Any:
        return self._function, self._arguments


def leave_a_mark(mark: str) -> None:
    RAN.append(mark)


def _named(prefix: str, state: dict[str, Tensor] = STATE) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


TAKEN: dict[str, Any] = {
    "tutorial": {"epoch": 3, "model_state_dict": STATE, "optimizer_state_dict": OPTIMIZER, "loss": 0.4},
    "lightning": {"state_dict": _named("model."), "hyper_parameters": {"lr": 0.1}, "callbacks": {"a": {"best": 1}}},
    "lightning with a loss": {"state_dict": _named("model.") | {"loss.weight": torch.ones(2)}},
    "only an average": {"state_dict_ema": STATE, "optimizer": OPTIMIZER},
    "namespace": {"model": STATE, "args": argparse.Namespace(lr=0.1), "optimizer": OPTIMIZER},
    "numpy": {"net": STATE, "best": np.float64(0.9), "history": np.zeros(3), "log": collections.defaultdict(list)},
    "compiled": _named("_orig_mod."),
    "compiled by ddp": _named("module._orig_mod."),
    "compiled inside": {key.replace("body.", "body._orig_mod."): value for key, value in STATE.items()},
    "averaged by torch": {"model_ema": _named("module.") | {"n_averaged": torch.tensor(3)}},
    "with a loss beside": {"state_dict": STATE, "criterion": {"weight": torch.ones(2)}},
    "nested": {"checkpoint": {"network": STATE, "optimizer": OPTIMIZER}},
    "half": {key: value.half() if value.is_floating_point() else value for key, value in STATE.items()},
    "extra state": STATE | {"body._extra_state": {"a": 1}},
    "a function beside": {"model": STATE, "tokenizer": Calls(leave_a_mark, "ran")},
}


def _load(path: Path, key: str | None = None, model: nn.Module | None = None) -> tuple[nn.Module, list[str]]:
    model = Net() if model is None else model
    return model, load_weights(model, read_file(path, key), "f", num_outputs=2)


def _is(model: nn.Module, state: dict[str, Tensor], but: float = 0.0) -> bool:
    return all(torch.allclose(value, state[key], atol=but) for key, value in model.state_dict().items())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", TAKEN)
def test_weights_that_can_be_told_are_taken_and_no_code_is_run(kind: str, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save(TAKEN[kind], path, _use_new_zipfile_serialization=not legacy)
    model, notes = _load(path)
    assert _is(model, STATE, 1e-2 if kind == "half" else 0.0)
    assert RAN == []
    said = {
        "lightning": ["its names without model."],
        "lightning with a loss": ["its names without model.", "without its 1 other entries: loss.weight"],
        "with a loss beside": ["of what it holds, state_dict was taken, criterion left out"],
        "only an average": ["of what it holds, state_dict_ema was taken"],
        "averaged by torch": ["of what it holds, model_ema was taken", "without its 1 other entries: n_averaged"],
        "nested": ["of what it holds, checkpoint.network was taken"],
    }
    assert notes == said.get(kind, [])


def test_names_without_the_models_own_prefix_are_taken(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    model, _ = _load(tmp_path / "a.pt", model=Inner())
    assert _is(model, _named("net."))


def test_safetensors_with_metadata_are_taken_whatever_their_suffix(tmp_path: Path) -> None:
    save_file(_named("module."), tmp_path / "a.pt", metadata={"format": "pt"})
    assert _is(_load(tmp_path / "a.pt")[0], STATE)


@pytest.mark.parametrize("first", [b"PK", b"\x80\x03", b"\x08\x04", b"\x1f\x8b"])
def test_safetensors_may_begin_with_any_length(first: bytes, tmp_path: Path) -> None:
    """The header's length, a multiple of 8 in little endian, can look like another format's first bytes."""
    path, wanted = tmp_path / "a.pt", int.from_bytes(first, "little")
    save_file(STATE, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].ljust(wanted)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert path.read_bytes().startswith(first)
    assert _is(_load(path)[0], STATE)


class Masked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((2,), -torch.inf))


def test_a_mask_may_hold_inf(tmp_path: Path) -> None:
    torch.save(Masked().state_dict(), tmp_path / "a.pt")
    assert _load(tmp_path / "a.pt", model=Masked())[1] == []


CHOICES: dict[str, tuple[Any, str, str, str]] = {
    "two averages beside": (
        {"model": OTHER, "model_ema": STATE, "model_swa": OTHER, "args": argparse.Namespace()},
        "model (9 tensors), model_ema (9 tensors, a moving average), model_swa (9 tensors, a moving average)",
        "--model.weights_key model, or --model.weights_key model_ema",
        "model_ema",
    ),
    "two networks": ({"generator": STATE, "critic": OTHER}, "generator (9 tensors)", "weights_key critic", "generator"),
    "two prefixes": (
        _named("student.net.", OTHER) | _named("teacher.net."),
        "several times, under student.net., teacher.net.",
        "--model.weights_key student.net, or --model.weights_key teacher.net",
        "teacher.net",
    ),
}


@pytest.mark.parametrize("kind", CHOICES)
def test_a_choice_between_weights_must_be_made(kind: str, tmp_path: Path) -> None:
    content, said, hint, key = CHOICES[kind]
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DataError) as caught:
        _load(tmp_path / "a.pt")
    assert said in caught.value.message and hint in caught.value.hint
    assert _is(_load(tmp_path / "a.pt", key)[0], STATE)
    with pytest.raises(DataError, match="holds no state_dict state_dict: it has"):
        _load(tmp_path / "a.pt", "state_dict")


class Whole(nn.Linear):
    pass


def _cut(content: Any, share: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save(content, path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return write


def _cut_safetensors(path: Path) -> None:
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-40])


def _script(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def _texts(text: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(text) and None


def _saved(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "optimizer": (
        _saved({"optimizer": OPTIMIZER, "epoch": 3}),
        "it has optimizer (an optimizer's state), epoch (int)",
        "torch.save(model.state_dict(), FILE)",
    ),
    "an optimizer alone": (_saved(OPTIMIZER), "it has state (a dict of 1), param_groups (list)", "torch.save("),
    "a model": (_saved(Whole(2, 2)), "it is an object of tests.models.test_weight_files.Whole", "weights_only=False"),
    "a model beside": (_saved({"model": Whole(2, 2), "epoch": 1}), "model (an object of tests.models", "if you trust"),
    "a tensor": (_saved(torch.zeros(3)), "it is a tensor [3]", "torch.save("),
    "a list": (_saved([STATE]), "it is list", "torch.save("),
    "nothing": (_saved({}), "it is an empty dict", "torch.save("),
    "truncated": (_cut(STATE, 0.6), "is truncated: it has", "again"),
    "truncated early": (_cut(STATE, 0.01), "is truncated", "again"),
    "truncated safetensors": (_cut_safetensors, "is truncated: it has", "again"),
    "empty": (_texts(b""), "is empty", "again"),
    "page": (_texts(b"\n<!DOCTYPE html><html>Quota exceeded"), "is a web page", "/resolve/"),
    "pointer": (_texts(b"version https://git-lfs.github.com/spec/v1\noid sha256:1"), "git-lfs", "git lfs pull"),
    "index": (_texts(json.dumps({"weight_map": {"a": "b"}}).encode()), "is a text (JSON)", "index"),
    "zipped": (_texts(b"\x1f\x8b\x08\x00" + bytes(20)), "compressed by gzip", "gunzip"),
    "pickle": (_texts(pickle.dumps({"a": 1})), "is a pickle of another program", "where you trust it"),
    "old pickle": (_texts(pickle.dumps({"a": 1}, 2)), "it is a pickle of another program", "again"),
    "code": (_saved({"model": STATE, "a": Calls(RAN.append, "ran")}), "reading it would run code of its own", "again"),
    "system": (_saved({"model": STATE, "a": Calls(os.system, "true")}), "reading it would run code", "again"),
    "text": (_texts(b"weights, as promised\n"), "cannot read weights from", "again"),
    "script": (_script, "is a TorchScript program", "torch.save("),
    "nan": (_saved(STATE | {"head.bias": torch.tensor([0.0, float("nan")])}), "head.bias has NaN or inf", "another"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused_in_words(kind: str, suffix: str, tmp_path: Path) -> None:
    write, said, hint = REFUSED[kind]
    path = tmp_path / f"weights{suffix}"
    write(path)
    with pytest.raises(DataError) as caught:
        _load(path)
    assert said in caught.value.message and hint in caught.value.hint
    assert "\n" not in caught.value.message and RAN == []


def test_numpys_archives_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", weight=np.zeros(3))
    with pytest.raises(DataError, match="is another archive"):
        _load(tmp_path / "a.npz")


@pytest.mark.parametrize("given", ["last.ckpt", "model.pth.tar", "pytorch_model.bin", "./final", "a.pt"])
def test_a_path_has_a_dot_or_a_slash(given: str) -> None:
    assert is_weights_file(given)
    assert not any(map(is_weights_file, ["DEFAULT", "IMAGENET1K_V1", "pretrained"]))


def test_a_folder_is_no_file_and_its_files_are_named(tmp_path: Path) -> None:
    def refused(weights: Path) -> tuple[str, str]:
        with pytest.raises(ConfigError) as caught:
            check_arguments(Config(model=ModelConfig(weights=str(weights))))
        (problem,) = caught.value.problems
        return problem.message, problem.hint

    assert refused(tmp_path) == (f"{tmp_path} is a folder, not a file", "give a file; there is none of weights in it")
    (tmp_path / "model.safetensors").touch()
    assert f"one of its files: {tmp_path / 'model.safetensors'}" in refused(tmp_path)[1]
    (tmp_path / "config.yaml").touch()
    assert f"--model.init_from {tmp_path}" in refused(tmp_path)[1]


def test_damaged_bytes_in_a_file_are_found_by_their_checksum(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"0.weight": torch.full((64, 64), 0.5)}, path)
    data = bytearray(path.read_bytes())
    place = data.index(torch.full((16,), 0.5).numpy().tobytes())
    data[place : place + 64] = bytes(64)
    path.write_bytes(data)
    with pytest.raises(DataError, match="w.pt is damaged: the checksum of .*data/0"):
        read_file(path)


def test_what_is_left_out_beside_the_usual_name_is_said(tmp_path: Path) -> None:
    state = {"0.weight": torch.ones(2)}
    torch.save(
        {"state_dict": state, "callbacks": {"EMA": {"ema_weights": {"0.weight": torch.zeros(2)}}}}, tmp_path / "w.ckpt"
    )
    weights = read_file(tmp_path / "w.ckpt")
    assert weights["0.weight"].tolist() == [1, 1]
    assert weights.notes == ("of what it holds, state_dict was taken, callbacks.EMA.ema_weights left out",)
    assert read_file(tmp_path / "w.ckpt", "callbacks.EMA.ema_weights")["0.weight"].tolist() == [0, 0]
