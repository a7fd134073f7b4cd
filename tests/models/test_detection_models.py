"""Detectors' dense parts: names and weights are torchvision's, and the descriptions fit the outputs."""

from __future__ import annotations

import pytest
import torch
import torchvision

from dist_train import registry
from dist_train.config.data import ModelConfig
from dist_train.errors import DataError
from dist_train.models.build import build_model, check_model
from dist_train.models.detection import renamed
from dist_train.models.weights import load_weights
from dist_train.registry import torchvision_names


def test_the_names_are_torchvisions() -> None:
    listed = torchvision.models.list_models(module=torchvision.models.detection)
    assert set(torchvision_names.DETECTION) < set(listed)
    assert set(torchvision_names.DETECTION) < set(registry.models.names())
    check_model(ModelConfig(name="ssdlite320_mobilenet_v3_large", weights="COCO_V1"))


@pytest.mark.parametrize(("channels", "size"), [(3, 64), (1, 96)])
def test_the_description_of_small_ssd_fits_its_outputs(channels: int, size: int) -> None:
    model = build_model(ModelConfig(name="small_ssd", args={"width": 4}), 5, channels)
    images = torch.zeros(2, channels, size, size)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    detector = model.detector(images)
    assert model.training and all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    outputs = model(images)
    assert outputs["cls_logits"].shape == (2, len(detector.anchors()), 6)
    assert detector.size == (size, size) and detector.kind == "ssd"


def test_torchvisions_weights_load_and_another_head_is_new() -> None:
    name = "ssdlite320_mobilenet_v3_large"
    theirs = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=91).state_dict()
    whole = build_model(ModelConfig(name=name), 90, 3)
    assert load_weights(whole, theirs, "torchvision", 90) == []
    assert torch.equal(
        whole.state_dict()["head.classification_head.module_list.0.1.weight"],
        theirs["head.classification_head.module_list.0.1.weight"],
    )
    other = build_model(ModelConfig(name=name), 4, 3)
    (note,) = load_weights(other, theirs, "torchvision", 4)
    assert note.startswith("the head head.classification_head.module_list.0.1") and "is new" in note
    with pytest.raises(DataError):
        load_weights(build_model(ModelConfig(name="small_ssd"), 4, 3), theirs, "torchvision", 4)


def test_retinanets_older_names_become_todays() -> None:
    layers = [f"head.classification_head.conv.{2 * place}" for place in range(4)]
    old = {f"{layer}.{kind}": torch.zeros(1) for layer in layers for kind in ("weight", "bias")}
    old["backbone.body.conv1.weight"] = torch.zeros(1)
    new = renamed(old)
    assert "head.classification_head.conv.3.0.weight" in new and "backbone.body.conv1.weight" in new
    assert len(new) == len(old) and renamed(new) == new
