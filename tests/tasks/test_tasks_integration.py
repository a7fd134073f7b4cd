"""Labels, numbers and masks go the whole way that classes go: nothing below a task knows about classes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_train
from dist_train.errors import ConfigError, DataError
from dist_train.run_dir.checkpoint import CheckpointFolder
from tests.support.ranks import train_done
from tests.support.torch_settings import own_torch_settings

TASKS = {
    "multilabel": ("map", {"name": "small_resnet", "args": {"width": 8, "blocks": 1}}),
    "regression": ("r2", {"name": "small_resnet", "args": {"width": 8, "blocks": 2}}),
    "segmentation": ("mean_iou", {"name": "small_fcn", "args": {"width": 4}}),
}


def settings(kind: str, folder: Path, **more: Any) -> Path:
    model = TASKS[kind][1]
    args = {"kind": kind, "num_train": 240, "num_eval": 41, "num_classes": 3, "channels": 1, "height": 12, "width": 12}
    config = {
        "run": {"name": kind, "dir": str(folder / "run"), "threads_per_rank": 1, "device": "cpu"},
        "data": {"name": "fake", "args": args, "cache_dir": str(folder / "cache"), "global_batch_size": 12},
        "model": model,
        "task": {"name": kind},
        "train": {"epochs": 5, "optim": {"lr": 0.1}},
        "qat": {"epochs": 1},
        **more,
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """A run in this process sets threads and determinism for good."""
    with own_torch_settings():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["regression", "segmentation"])
def test_a_task_is_trained_and_converted_with_quantization_in_the_loop(kind: str, tmp_path: Path) -> None:
    path = settings(kind, tmp_path, stages=["train", "qat", "convert"])
    results = dist_train.run(dist_train.load_config(path))
    metric = TASKS[kind][0]
    models = results["models"]
    assert {figures["count"] for figures in models.values()} == {41}
    assert models["fp32"][metric] > 0.7
    assert models["int8"][metric] > models["fp32"][metric] - 0.05
    assert results["gates"]["convert"]["value"] >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_a_task_is_deployed(kind: str, tmp_path: Path) -> None:
    results = dist_train.run(dist_train.load_config(settings(kind, tmp_path, export={"latency": False})))
    require_deployed(kind, tmp_path, results, (4, 3))


@pytest.mark.slow
def test_two_ranks_deploy_a_task_and_evaluate_it_again(tmp_path: Path) -> None:
    printed = train_done(2, "run", str(settings("segmentation", tmp_path, export={"latency_batch_sizes": [1]})))
    assert "gates passed: prepare" in printed and "pixel acc 0." in printed
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    require_deployed("segmentation", tmp_path, results, (4, 3, 12, 12))
    again = train_done(1, "evaluate", str(tmp_path / "run"))
    assert f"{results['models']['int8']['mean_iou'] * 100:.2f} %" in again


def require_deployed(kind: str, folder: Path, results: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Every gate passed, and the artifact answers for its task."""
    metric = TASKS[kind][0]
    assert all(results["gates"][name]["passed"] for name in ("prepare", "convert", "artifact"))
    assert results["models"]["int8"][metric] > 0.7 and results["models"]["int8"]["count"] == 41
    model, manifest = dist_train.load_artifact(folder / "run" / "export")
    assert model(torch.zeros(4, 1, 12, 12)).shape == shape
    assert manifest["classes"] == ([] if kind == "regression" else ["class 0", "class 1", "class 2"])
    assert manifest["metrics"]["int8"][metric] == results["models"]["int8"][metric]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task.name", "classification"], "classification takes targets int64"),
        (["--model.name", "small_resnet", "--model.args", "{}"], "segmentation into 3 classes takes"),
        (["--data.args.height", "13", "--model.name", "shrinking"], "do not fit"),
        (["--model.name", "two_headed"], "while training, the model returns a tuple"),
    ],
)
def test_what_does_not_fit_is_found_before_training(options: list[str], said: str, tmp_path: Path) -> None:
    path = settings("segmentation", tmp_path, model={"name": "small_fcn"})
    config = dist_train.load_config(path, [*options, "--import", "tests.support.ill_fitting_models"])
    with pytest.raises(DataError) as caught:
        dist_train.run(config)
    assert said in caught.value.message and caught.value.hint
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--data.augment", "[{name: random_horizontal_flip}]"], "random_horizontal_flip would move"),
        (["--data.mix.cutmix", "1.0"], "cutmix would move"),
    ],
)
def test_augmentation_that_leaves_masks_behind_is_refused(option: list[str], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        dist_train.run(dist_train.load_config(settings("segmentation", tmp_path), option))


def test_augmentation_that_moves_no_pixel_is_fine_with_masks(tmp_path: Path) -> None:
    path = settings("segmentation", tmp_path, stages=["train"], train={"epochs": 1})
    option = ["--data.augment", "[{name: color_jitter, brightness: 0.2}]"]
    assert dist_train.run(dist_train.load_config(path, option))["models"]["fp32"]["count"] == 41


def test_trying_a_model_out_leaves_it_as_it_was(tmp_path: Path) -> None:
    path = settings("regression", tmp_path, stages=["train"], train={"epochs": 1, "optim": {"lr": 1e-30}})
    results = dist_train.run(
        dist_train.load_config(path, ["--import", "tests.support.ill_fitting_models", "--model", "{name: counting}"])
    )
    # 240 samples in global batches of 12, and nothing more, went through the BatchNorm.
    state = CheckpointFolder(tmp_path / "run" / "checkpoints").load("train-end")["payload"]["model"]
    assert int(state["norm.num_batches_tracked"]) == 20 and results["models"]["fp32"]["count"] == 41
