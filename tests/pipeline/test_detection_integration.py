"""Whole runs of a detector: losses equal on 1, 2 and 3 ranks; float to int8 and its files; killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_train
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from dist_train.run_dir.ledger import check
from dist_train.run_dir.paths import RunDir
from dist_train.tasks.detector import Detector, detections
from tests.pipeline.test_exactness_integration import bytes_of, lines
from tests.support.ranks import train, train_done
from tests.support.small_runs import run_here

CONFIG = """
run: {name: shapes, threads_per_rank: 1, device: cpu}
data:
  name: shapes
  args: {num_train: 34, num_eval: 13, size: 32}
  global_batch_size: 12
  eval_batch_size: 4
  workers: 0
  augment: [{name: random_horizontal_flip}]
model: {name: small_ssd, args: {width: 4}}
task: {name: detection}
stages: [train]
train: {epochs: 2, optim: {name: adamw, lr: 0.003}}
qat: {epochs: 1, optim: {name: adamw, lr: 0.001}}
convert: {agreement_bound: 0.8}
checkpoint: {every_steps: 1}
log: {every_steps: 1}
debug: {ledger: true}
"""
WHOLE = ["--stages", "[train, ptq, qat, convert, export]"]
SHORT = ["--stages", "[train, qat, convert, export]", "--convert.runtime", "none", "--export.latency", "false"]


def command(folder: Path, run_dir: Path, *settings: str) -> list[str]:
    path = folder / "shapes.yaml"
    path.write_text(CONFIG)
    return ["run", str(path), "--run.dir", str(run_dir), *settings]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in map(dict, read_lines(run_dir)) if "loss" in line]


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunDir(run_dir).metrics.read_text().splitlines()]


@pytest.mark.slow
def test_the_losses_are_equal_on_one_two_and_three_ranks(tmp_path: Path) -> None:
    # BatchNorm's statistics are those of a rank.
    settings = ["--model.args", "{width: 4, norm: false}", "--train.epochs", "1"]
    settings += ["--train.optim.name", "sgd", "--train.optim.lr", "0.01"]
    found, evaluated = [], []
    for ranks in (1, 2, 3):
        run_dir = tmp_path / str(ranks)
        train_done(ranks, *command(tmp_path, run_dir, *settings))
        found.append(losses(run_dir))
        evaluated.append(read_json(RunDir(run_dir).results)["models"]["fp32"])
    assert len(found[0]) == 3
    for other, figures in zip(found[1:], evaluated[1:], strict=True):
        assert other == pytest.approx(found[0], rel=1e-4)
        assert figures["count"] == 13
        assert [figures[name] for name in ("map", "map50")] == pytest.approx(
            [evaluated[0][name] for name in ("map", "map50")], abs=1e-3
        )


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        pytest.param(2, ["--export.formats", "[pt2, onnx]", "--export.postprocess", "true"], marks=pytest.mark.slow),
        pytest.param(1, ["--export.formats", "[pt2, onnx, openvino]"], marks=pytest.mark.slow),
        pytest.param(2, ["--qat.backend", "fx"], marks=pytest.mark.slow),
        pytest.param(1, ["--export.formats", "[executorch, auto]"], marks=pytest.mark.slow),
    ],
)
def test_a_detector_goes_the_whole_way(ranks: int, settings: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_done(ranks, *command(tmp_path, run_dir, *WHOLE, *settings))
    results = read_json(RunDir(run_dir).results)
    assert all(gate["passed"] for gate in results["gates"].values()), results["gates"]
    assert set(results["models"]) == {"fp32", "ptq", "fake_quant", "int8"}
    assert results["models"]["int8"]["count"] == 13 and results["models"]["int8"]["weights"]["share"] > 0.99
    export, images = RunDir(run_dir).export, torch.rand(3, 3, 32, 32)
    call, manifest = dist_train.load_artifact(export, postprocess=False)
    assert sorted(manifest["outputs"]) == ["bbox_regression", "cls_logits"]
    outputs = call(images)
    assert manifest["shown_score"] == 0.3
    wanted = detections(outputs, Detector.of_json(manifest["detector"]))
    made = dist_train.load_artifact(export, postprocess=True)[0](images)
    assert len(made) == len(wanted) == 3
    for found, each in zip(made, wanted, strict=True):
        assert torch.equal(found["boxes"], each.boxes) and torch.equal(found["labels"], each.classes)
    asked = "--export.postprocess" in settings
    assert isinstance(dist_train.load_artifact(export)[0](images), list) == asked
    assert manifest.get("postprocess") == ({"onnx": "boxes.onnx"} if asked else None)
    assert ("boxes.onnx" in manifest["files"]) == asked
    assert run_here("export", str(run_dir), "--model", "fp32", "--format", "onnx") == 0
    assert read_json(RunDir(run_dir).export / "manifest.json")["detector"] == manifest["detector"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_detector_is_killed_in_train_and_in_qat_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_done(2, *command(tmp_path, whole, *SHORT))
    total = lines(whole)
    for share in (0.4, 0.8):
        with train(2, *command(tmp_path, killed, *SHORT)) as ranks:
            assert ranks.until(lambda share=share: lines(killed) >= total * share), ranks.printed()  # type: ignore[misc]
            ranks.kill()
        assert read_json(RunDir(killed).status)["state"] != "done"
    train_done(2, *command(tmp_path, killed, *SHORT))
    folders = [CheckpointFolder(RunDir(path).checkpoints) for path in (whole, killed)]
    assert folders[0].names() == folders[1].names()
    for name in folders[0].names():
        one, other = (bytes_of(folder.load(name)["payload"]) for folder in folders)
        assert one == other, name
    assert check(killed).ok
    for file in sorted((whole / "export").iterdir()):
        if file.suffix != ".json":
            assert file.read_bytes() == (killed / "export" / file.name).read_bytes(), file.name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ssdlite_goes_the_whole_way(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = ["--model.name", "ssdlite320_mobilenet_v3_large", "--model.args", "{}", "--data.args.size", "64"]
    train_done(1, *command(tmp_path, run_dir, *SHORT, *settings, "--train.epochs", "1"), deadline=600)
    results = read_json(RunDir(run_dir).results)
    assert all(gate["passed"] for gate in results["gates"].values()), results["gates"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["--model.name", "small_resnet", "--model.args", "{}"], "no method detector(images)"),
        (["--data.augment", "[{name: random_crop}]"], "random_crop would move the images, but not their boxes"),
        (["--task.name", "classification"], "targets"),
        (["--data.mix.mixup", "0.2"], "sums them"),
        (["--data.name", "fake", "--data.args", "{}"], "detection takes targets {boxes, mask}"),
    ],
)
def test_what_does_not_fit_is_named_before_training(settings: list[str], said: str, tmp_path: Path) -> None:
    with train(1, *command(tmp_path, tmp_path / "run", *settings)) as ranks:
        assert ranks.wait() != [0]
        assert said in ranks.output(0), ranks.output(0)
