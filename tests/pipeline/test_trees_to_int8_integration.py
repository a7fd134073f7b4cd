"""Whole runs on padded texts, a dict of inputs, to int8 on two ranks: killed in qat, they end with equal files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dist_train.artifact.load import load_artifact
from dist_train.cli import main
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.support import tree_parts  # noqa: F401  (registers the data and the model)
from tests.support.ranks import train, train_done

pytestmark = pytest.mark.slow

CONFIG = """
run: {name: texts, threads_per_rank: 1, device: cpu}
data: {name: texts, args: {size: 61, ragged: true}, global_batch_size: 8, eval_batch_size: 4}
model: {name: bag}
stages: [train, ptq, qat, convert, export]
train: {epochs: 12, optim: {name: adamw, lr: 0.05}}
qat: {epochs: 6, optim: {name: adamw, lr: 0.01}}
export: {formats: [onnx], models: [int8, fp32], latency: false}
compile: false
checkpoint: {every_steps: 4}
log: {every_steps: 1}
"""


def command(folder: Path, run_dir: Path) -> list[str]:
    path = folder / "texts.yaml"
    path.write_text(CONFIG)
    return ["run", str(path), "--import", "tests.support.tree_parts", "--run.dir", str(run_dir)]


def steps_of(run_dir: Path, stage: str) -> int:
    """Steps that the log of a run has of a stage."""
    path = RunDir(run_dir).metrics
    text = path.read_text() if path.exists() else ""
    return sum(f'"{stage}"' in line or f"{stage}/" in line for line in text.splitlines())


@pytest.mark.timeout(900)
def test_a_dict_of_padded_texts_becomes_int8_and_survives_a_kill_with_the_same_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_done(2, *command(tmp_path, whole))
    with train(2, *command(tmp_path, killed)) as ranks:
        assert ranks.until(lambda: steps_of(killed, "qat") >= 10), ranks.printed()
        ranks.kill()
    assert read_json(RunDir(killed).status)["state"] != "done"
    train_done(2, *command(tmp_path, killed))
    one, other = (RunDir(path) for path in (whole, killed))
    for file in sorted(one.export.iterdir()):
        assert file.read_bytes() == (other.export / file.name).read_bytes(), file.name
    gates = read_json(other.results)["gates"]
    assert all(
        gates[name]["passed"] for name in ("prepare", "gradients", "convert", "lowered", "format_onnx", "artifact")
    )
    call, manifest = load_artifact(other.export)
    assert [leaf["name"] for leaf in manifest["inputs"]] == ["ids", "mask"] and manifest["outputs"] == ["logits"]
    assert manifest["dynamic"] == {"ids": {"1": "words"}, "mask": {"1": "words"}}
    found = call({"ids": torch.tensor([[1, 2, 3, 4, 5, 6, 7]]), "mask": torch.ones(1, 7, dtype=torch.bool)})
    assert found["logits"].shape == (1, 3)
    # The finished run: its config's data evaluate every model, and further models are written from it.
    assert main(["evaluate", str(killed), "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert {"fp32", "int8"} <= models.keys() and models["int8"]["count"] == 19
    assert main(["export", str(killed), "--model", "fp32", "--format", "openvino"]) == 0
    assert "fp32 as openvino" in capsys.readouterr().out
