"""Models of torchvision and timm by name, for images of any number of channels."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from dist_train import registry
from dist_train.config.checks.general import contradictions
from dist_train.config.data import ModelConfig
from dist_train.config.tree import Config
from dist_train.errors import ConfigError
from dist_train.models.build import build_model, check_model
from dist_train.models.small import small_fcn
from dist_train.registry import torchvision_names

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="only with timm (pip install timm)")


def outputs(name: str, channels: int, size: int, train: bool = False) -> torch.Tensor:
    config = ModelConfig(name=name)
    check_model(config)
    answer: torch.Tensor = build_model(config, 4, channels).train(train)(torch.zeros(2, channels, size, size))
    return answer


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_torchvisions_models_take_images_of_any_number_of_channels(channels: int) -> None:
    assert outputs("mobilenet_v3_small", channels, 32).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "size"), [("googlenet", 32), pytest.param("inception_v3", 96, marks=pytest.mark.slow)]
)
def test_models_with_auxiliary_heads_put_out_one_tensor_in_train_mode(name: str, size: int) -> None:
    assert outputs(name, 1, size, train=True).shape == (2, 4)


@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", pytest.param("fcn_resnet50", marks=pytest.mark.slow)])
def test_torchvisions_segmentation_models_put_out_a_score_of_each_class_for_each_pixel(name: str) -> None:
    assert outputs(name, 1, 32, train=True).shape == (2, 4, 32, 32)


def test_the_names_of_torchvisions_segmentation_models_are_all_there() -> None:
    import torchvision

    listed = torchvision.models.list_models(module=torchvision.models.segmentation)
    assert sorted(torchvision_names.SEGMENTATION) == listed
    assert set(listed) < set(registry.models.names())


@pytest.mark.parametrize("shape", [(8, 8), (9, 13)])
def test_small_fcn_takes_images_of_any_size(shape: tuple[int, int]) -> None:
    assert small_fcn(3, 2, width=4)(torch.zeros(2, 2, *shape)).shape == (2, 3, *shape)


@needs_timm
@pytest.mark.parametrize("channels", [1, 3])
def test_timms_models_go_by_their_names_behind_timm(channels: int) -> None:
    assert outputs("timm/mobilenetv3_small_050", channels, 32).shape == (2, 4)


@needs_timm
def test_a_name_that_timm_does_not_know_gets_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        check_model(ModelConfig(name="timm/resnet81"))
    (problem,) = caught.value.problems
    assert problem.place == "model.name" and "timm/resnet18" in problem.hint
    with pytest.raises(ConfigError) as caught:
        check_model(ModelConfig(name="timm/resnet18", weights="DEFAULT"))
    assert "--model.weights pretrained" in caught.value.problems[0].hint


def test_timm_that_is_not_installed_is_a_mistake_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else object())
    (problem,) = contradictions(Config.model_validate({"model": {"name": "timm/resnet18"}}), {})
    assert problem.place == "model.name" and problem.hint == "pip install timm"
    assert "timm/" not in registry.models
