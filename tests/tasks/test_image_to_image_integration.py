"""A U-Net goes the whole way, image to image: trained, with quantization in the loop, to int8 files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dist_train
from tests.support import signal_nets
from tests.support.torch_settings import own_torch_settings

assert signal_nets  # its import registers the model and the dataset


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """A run in this process sets threads and determinism for good."""
    with own_torch_settings():
        yield


def trained(folder: Path, data: dict[str, object], task: str, *stages: str) -> dict[str, dict[str, float]]:
    config = {
        "run": {"name": "unet", "dir": str(folder / "run"), "threads_per_rank": 1, "device": "cpu"},
        "data": {"cache_dir": str(folder / "cache"), "global_batch_size": 12, **data},
        "model": {"name": "unet"},
        "task": {"name": task},
        "stages": stages,
        "train": {"epochs": 4, "optim": {"lr": 0.1}},
        "qat": {"epochs": 1},
        "export": {"formats": ["onnx", "openvino"], "latency": False},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    results = dist_train.run(dist_train.load_config(path))
    assert all(gate["passed"] for gate in results["gates"].values())
    assert results["models"]["int8"]["weights"]["share"] == 1.0
    return results["models"]


@pytest.mark.slow
def test_noise_is_removed_from_images(tmp_path: Path) -> None:
    models = trained(tmp_path, {"name": "noisy_images"}, "regression", "train", "ptq", "qat", "convert", "export")
    assert models["fp32"]["count"] == models["int8"]["count"] == 41
    assert models["fp32"]["r2"] > 0.9, "of 10,496 pixels"
    assert models["int8"]["r2"] > models["fp32"]["r2"] - 0.03
    assert {path.suffix for path in (tmp_path / "run" / "export").iterdir()} >= {".onnx", ".json"}
    model, _ = dist_train.load_artifact(tmp_path / "run" / "export")
    assert model(torch.zeros(3, 1, 16, 16)).shape == (3, 1, 16, 16)


@pytest.mark.slow
def test_masks_are_found(tmp_path: Path) -> None:
    args = {"kind": "segmentation", "num_train": 240, "num_eval": 41, "num_classes": 3, "height": 16, "width": 16}
    models = trained(tmp_path, {"name": "fake", "args": args}, "segmentation", "train", "qat", "convert", "export")
    assert models["int8"]["mean_iou"] > models["fp32"]["mean_iou"] - 0.05
