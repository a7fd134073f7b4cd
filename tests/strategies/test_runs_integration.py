"""Runs the pipeline in each precision; checks the lines and records about `auto`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_train
from dist_train.run_dir.files import replace_json
from dist_train.run_dir.ledger import check
from tests.support.ranks import train_done

SMALL = {
    "data": {"name": "digits", "global_batch_size": 256, "workers": 0},
    "model": {"name": "mlp", "args": {"size": 8}},
    "train": {"epochs": 1},
    "qat": {"epochs": 1},
}


def small(folder: Path, **settings: Any) -> dist_train.Config:
    return dist_train.Config.model_validate({**SMALL, "run": {"dir": str(folder), "device": "cpu"}, **settings})


def test_a_run_says_what_auto_came_to_and_keeps_its_precision_when_it_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path / "run", stages=["train"], precision="auto")
    dist_train.run(config)
    first = capsys.readouterr().out.splitlines()[0]
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert first.startswith(f"auto: strategy single (1 rank), precision {recorded['precision']} (this CPU "), first
    # Pretends that the first start was on another machine.
    other = "fp32" if recorded["precision"] == "bf16" else "bf16"
    replace_json(tmp_path / "run" / "environment.json", {**recorded, "precision": other})
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    replace_json(tmp_path / "run" / "status.json", {**status, "state": "failed"})
    dist_train.run(config)
    assert f"precision {other} (as at the first start)" in capsys.readouterr().out.splitlines()[0]
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["precision"] == other


def test_dp_without_gpus_says_that_it_runs_as_single_and_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name in ("dp", "single"):
        dist_train.run(small(tmp_path / name, stages=["train"], strategy=name, train={"epochs": 2}))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found[name] = [line["loss"] for line in lines if "loss" in line]
        said = "strategy dp runs as single: dp needs two CUDA devices, and this process runs on the CPU"
        assert (said in capsys.readouterr().out.splitlines()) == (name == "dp")
    assert found["dp"] == found["single"] and len(found["dp"]) > 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_quantization_aware_training_and_conversion_run_under_autocast(precision: str, tmp_path: Path) -> None:
    config = small(
        tmp_path / "run",
        precision=precision,
        stages=["train", "ptq", "qat", "convert"],
        model={"name": "small_resnet", "args": {"width": 4, "blocks": 1}},
        data={"name": "digits", "global_batch_size": 64, "workers": 0},
        train={"epochs": 4},
        debug={"ledger": True},
    )
    results = dist_train.run(config)
    assert all(gate["passed"] for gate in results["gates"].values()) and "convert" in results["gates"]
    models = results["models"]
    assert models["fp32"]["top1"] > 0.3
    assert models["int8"]["top1"] == pytest.approx(models["fake_quant"]["top1"], abs=0.02)
    assert check(tmp_path / "run").ok


@pytest.mark.gpu
def test_two_nccl_ranks_train_what_one_gpu_trains(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("only on a machine with two CUDA devices")
    losses = []
    (tmp_path / "config.yaml").write_text("{}\n")
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        options = {
            "run.dir": str(folder),
            "run.device": "cuda",
            "data.name": "digits",
            "data.global_batch_size": "256",
            "model": "{name: mlp, args: {size: 8}}",
            "stages": "[train, ptq, qat]",
            "train.epochs": "2",
            "log.every_steps": "1",
        }
        arguments = [text for key, value in options.items() for text in (f"--{key}", value)]
        train_done(ranks, "run", str(tmp_path / "config.yaml"), *arguments)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if line["stage"] == "train" and "loss" in line])
    assert len(losses[0]) > 5 and losses[1] == pytest.approx(losses[0], rel=1e-3)
