"""Runs backend fx with bf16 and compile on two ranks, up to int8; test_pairs_integration.py covers pt2e only."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import train_done

CONFIG = """
run: {{name: fx_pairs, threads_per_rank: 1, device: cpu}}
data: {{name: digits, cache_dir: {folder}/cache, global_batch_size: 128, drop_last: true}}
model: {{name: small_resnet, args: {{width: 8, blocks: 1}}}}
strategy: ddp
precision: bf16
compile: true
stages: [qat, convert]
qat: {{backend: fx, epochs: 3, evaluate_every: 3, optim: {{lr: 0.3}}, freeze_batch_norm: 1.0, freeze_ranges: 1.0}}
convert: {{agreement_bound: 0.95}}
"""


@pytest.mark.slow
def test_fx_trains_in_bf16_compiled_on_two_ranks_and_converts(tmp_path: Path) -> None:
    path = tmp_path / "fx_pairs.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    train_done(2, "run", str(path), "--run.dir", str(tmp_path / "run"), deadline=250.0)
    run_dir = RunDir(tmp_path / "run")
    results = read_json(run_dir.results)
    assert results["world_size"] == 2
    for model in ("fake_quant", "int8"):
        found = results["models"][model]
        assert found["count"] == 360 and math.isfinite(found["loss"]) and found["top1"] > 0.3, (model, found)
    assert results["gates"]["convert"]["passed"]
    lines = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses and all(map(math.isfinite, losses))
