"""Tests the patterns of `freeze` and `optim.groups`: what they match, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from torch import nn

from dist_train.config.fit import OptimConfig
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from dist_train.quantization.backend import build_backend
from dist_train.training.optim import build_optimizer
from dist_train.training.parts import Parts, check_parts, float_names, resolve_parts
from tests.support.one_net_all_backends import StubNet
from tests.support.tiny_nets import TinyNet


def config(stage: str = "train", **settings: Any) -> Config:
    return Config.model_validate({stage: settings})


def parts(stage: str = "train", model: nn.Module | None = None, **settings: Any) -> Parts:
    return resolve_parts(config(stage, **settings), stage, model or TinyNet())


@pytest.mark.parametrize(
    ("patterns", "parameters", "batch_norms"),
    [
        (["bn1"], {"bn1.weight", "bn1.bias"}, {"bn1"}),
        (["bn1.*"], {"bn1.weight", "bn1.bias"}, {"bn1"}),
        (["bn1.weight"], {"bn1.weight"}, set()),
        (["conv?.weight"], {"conv1.weight", "conv2.weight"}, set()),
        ([{"type": "BatchNorm*"}], {f"bn{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}, {"bn1", "bn2"}),
        (["fc", "conv1"], {"fc.weight", "fc.bias", "conv1.weight"}, set()),
    ],
)
def test_patterns_are_of_parameters_and_of_the_modules_around_them(
    patterns: list[Any], parameters: set[str], batch_norms: set[str]
) -> None:
    found = parts(freeze=patterns)
    assert (found.frozen, found.batch_norms) == (parameters, batch_norms)


def test_a_batch_norm_without_parameters_is_frozen_with_its_module() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False)), nn.Linear(2, 2))
    assert parts(model=model, freeze=["0"]).batch_norms == {"0.1"}


def test_a_parameter_with_two_names_is_frozen_under_both() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert parts(model=model, freeze=["1"]).frozen == {"0.weight", "1.weight", "1.bias"}


def test_the_first_group_that_matches_counts() -> None:
    groups = [{"match": "*.bias", "lr": 0.1}, {"match": "fc", "lr": 0.2}]
    found = parts(optim={"groups": groups}).groups
    assert found == ({"bn1.bias", "conv2.bias", "bn2.bias", "fc.bias"}, {"fc.weight"})


def test_muon_shows_the_groups_for_what_is_no_matrix() -> None:
    """The text of the hint, as it stands, makes the settings right."""
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 2)})
    with pytest.raises(ConfigError) as caught:
        parts(model=model, optim={"name": "Muon"})
    (problem,) = caught.value.problems
    assert (problem.place, "5 have others: conv.bias, conv.weight, head.bias and 2" in problem.message) == (
        "train.optim.name",
        True,
    ), problem
    text = problem.hint.partition("train.optim.groups: ")[2].rpartition("; or freeze")[0]
    groups = yaml.safe_load(text)
    assert [each["match"] for each in groups] == [{"type": "Conv2d"}, {"type": "LayerNorm"}, "*.bias"]
    found = parts(model=model, optim={"name": "Muon", "groups": groups})
    optimizer = build_optimizer(model, OptimConfig(name="Muon", groups=groups), groups=found.groups)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    parts(model=model, freeze=["conv", "norm", "head.bias"], optim={"name": "Muon"})
    with pytest.raises(ConfigError, match="Muon takes parameters of two dimensions alone, and 2 have others: conv"):
        parts(model=model, optim={"name": "adamw", "groups": [{"match": "conv", "name": "Muon"}]})


def test_qat_freezes_what_train_kept_frozen_unless_it_says_otherwise() -> None:
    def frozen(train: dict[str, Any], qat: dict[str, Any], stages: list[str]) -> frozenset[str]:
        given = Config.model_validate({"train": train, "qat": qat, "stages": stages})
        return resolve_parts(given, "qat", TinyNet()).frozen

    kept, both = {"freeze": ["fc.bias"]}, ["train", "qat"]
    assert frozen(kept, {}, both) == {"fc.bias"}
    assert frozen(kept, {"freeze": []}, both) == frozenset()
    assert frozen(kept, {"freeze": ["fc.weight"]}, both) == {"fc.weight"}
    assert frozen({**kept, "unfreeze_at": 1}, {}, both) == frozenset()
    assert frozen(kept, {}, ["ptq", "qat"]) == frozenset(), "train did not run"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"freeze": ["bm1.*"]}, ("train.freeze.0", "'bm1.*' matches no parameter or module", "did you mean bn1.*")),
        ({"freeze": ["*"]}, ("train.freeze", "freezes all 9 parameters", "leave the head out")),
        ({"freeze": [{"type": "Conv3d"}]}, ("train.freeze.0", "{type: Conv3d} matches no", "{type: Conv2d}")),
        ({"optim": {"groups": [{"match": "f", "lr": 1}]}}, ("train.optim.groups.0.match", "'f' matches no", "fc")),
        (
            {"optim": {"groups": [{"match": "*", "lr": 1}, {"match": "fc", "lr": 2}]}},
            ("train.optim.groups.1.match", "earlier groups match all that it does", "put it before them"),
        ),
        (
            {"optim": {"groups": [{"match": "fc", "lr": 1}]}, "freeze": ["fc"]},
            ("train.optim.groups.0.match", "fc.bias, fc.weight learn nothing: they are frozen", "freeze less"),
        ),
        (
            {"optim": {"groups": [{"match": "bn1", "weight_decay": 1}]}},
            ("train.optim.groups.0.weight_decay", "changes nothing: bn1.bias, bn1.weight have", "decay_norm"),
        ),
    ],
)  # fmt: skip
def test_patterns_that_mean_nothing_are_refused(settings: dict[str, Any], expected: tuple[str, str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_parts(config(**settings), TinyNet())
    (problem,) = caught.value.problems
    assert problem.place == expected[0] and expected[1] in problem.message and expected[2] in problem.hint, problem


def test_a_group_of_what_is_unfrozen_later_is_right() -> None:
    groups = {"groups": [{"match": "fc", "lr": 1}]}
    assert parts(freeze=["fc"], unfreeze_at=1, optim=groups).groups == ({"fc.weight", "fc.bias"},)


@pytest.mark.heavy
@pytest.mark.parametrize("backend", ["pt2e", "fx", "eager"])
def test_each_parameter_of_a_prepared_model_is_known_by_its_float_name(backend: str) -> None:
    model = StubNet().eval()
    chosen = Config.model_validate({"qat": {"backend": backend}}).qat
    prepared = build_backend(chosen).prepare(model, torch.zeros(2, 3, 8, 8))
    names = float_names(prepared, model)
    values = dict(model.named_parameters())
    assert set(names.values()) == set(values)
    for name, parameter in prepared.named_parameters():
        assert parameter.equal(values[names[name]]), name
