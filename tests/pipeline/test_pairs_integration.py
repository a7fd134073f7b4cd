"""Combines settings from float training to int8: every pair of them occurs in at least one of six runs."""

from __future__ import annotations

import json
import math
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from dist_train.run_dir import state_codec as codec
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import train, train_done

# No partial batch, because every further shape is compiled again.
CONFIG = """
run: {name: pairs, threads_per_rank: 1, device: cpu}
data:
  name: digits
  global_batch_size: 128
  drop_last: true
model: {name: small_resnet, args: {width: 8, blocks: 1}}
stages: [train, qat, convert]
train: {epochs: 3, evaluate_every: 2, optim: {lr: 0.3}}
qat: {epochs: 2, optim: {lr: 0.01}, freeze_batch_norm: 1.0, freeze_ranges: 1.0}
convert: {agreement_bound: 0.95}
"""
AVERAGE = {"decay": 0.8, "samples": 600}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "strategy": ({"strategy": "single"}, {"strategy": "ddp"}),
    "precision": ({}, {"precision": "bf16"}),
    "compile": ({}, {"compile": "true"}),
    "accumulation": ({}, {"data.micro_batch_size": 32}),
    "clipping": ({}, {"train.clip_grad_norm": 0.5, "qat.clip_grad_norm": 0.5}),
    "average": ({}, {f"{stage}.ema_{key}": value for stage in ("train", "qat") for key, value in AVERAGE.items()}),
    "synchronised": ({}, {"sync_batchnorm": "true"}),
    "dropout": ({}, {"qat.dropout": "true"}),
}
# Each column is on in three of the last five rows, a different set for each. Any two columns so have all four
# combinations of on and off; both are off in the first row (Kleitman and Spencer
# 1973, Discrete Mathematics 6: no array of six rows covers more than ten columns).
ROWS = list(zip(*([0, *(int(row in on) for row in range(5))] for on in combinations(range(5), 3)), strict=True))
RESUMED = (3, 4)
IN_CI = (3, 4, 5)
DEADLINE = 400.0  # seconds; for a run that compiles on ranks that share cores


def choices(row: int) -> dict[str, int]:
    return dict(zip(OPTIONS, ROWS[row], strict=False))


def test_each_pair_of_settings_is_in_one_of_the_runs() -> None:
    for left, right in combinations(OPTIONS, 2):
        met = {(choices(row)[left], choices(row)[right]) for row in range(6)}
        assert met == set(product((0, 1), repeat=2)), (left, right)


def command(row: int, folder: Path, name: str) -> tuple[int, list[str]]:
    path = folder / "pairs.yaml"
    path.write_text(CONFIG.replace("data:\n", f"data:\n  cache_dir: {folder / 'cache'}\n"))
    given = {key: value for option, at in choices(row).items() for key, value in OPTIONS[option][at].items()}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return 1 + choices(row)["strategy"], ["run", str(path), "--run.dir", str(folder / name), *words]


def states(run_dir: Path) -> dict[str, bytes]:
    folder = CheckpointFolder(RunDir(run_dir).checkpoints)
    found = {}
    for name in folder.names():
        _, tensors = codec.encode(folder.load(name)["payload"])
        found |= {f"{name} {key}": tensor.contiguous().numpy().tobytes() for key, tensor in tensors.items()}
    return found


# The rows in CI have each option on and off; only all six have all pairs.
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow if row in IN_CI else pytest.mark.long) for row in range(6)]
)
def test_they_train_evaluate_and_convert_together(row: int, tmp_path: Path) -> None:
    world_size, words = command(row, tmp_path, "run")
    train_done(world_size, *words, deadline=DEADLINE)
    results = read_json(RunDir(tmp_path / "run").results)
    for model in ("fp32", "fake_quant", "int8"):
        found = results["models"][model]
        assert found["count"] == 360 and math.isfinite(found["loss"]) and found["top1"] > 0.3, (model, found)
    assert results["gates"]["convert"]["passed"]
    lines = [json.loads(line) for line in RunDir(tmp_path / "run").metrics.read_text().splitlines()]
    for stage in ("train", "qat"):
        losses = [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]
        assert losses and all(map(math.isfinite, losses))
    if row not in RESUMED:
        return
    _, again = command(row, tmp_path, "killed")
    latest = RunDir(tmp_path / "killed").checkpoints / "latest.json"
    with train(world_size, *again) as ranks:
        saved = ranks.until(lambda: (read_json(latest) or {}).get("name", "").startswith("qat-0"))
        assert saved, ranks.printed()
        ranks.kill()
    train_done(world_size, *again, deadline=DEADLINE)
    assert_same_bytes(tmp_path / "run", tmp_path / "killed")


def assert_same_bytes(left: Path, right: Path) -> None:
    first, second = states(left), states(right)
    assert first.keys() == second.keys() and [key for key in first if first[key] != second[key]] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_qat_killed_after_batch_norm_froze_ends_with_the_bytes_of_an_undisturbed_run(
    tmp_path: Path,
) -> None:
    _, words = command(0, tmp_path, "run")
    words += [
        "--import",
        "tests.support.one_net_all_backends",
        "--model.name",
        "stub_net",
        "--model.args",
        "{}",
        "--compile",
        "true",
    ]
    words += ["--strategy", "ddp"]
    # Of 11 steps. BatchNorm freezes before the fourth, which compiles another graph.
    words += ["--stages", "[ptq, qat]", "--qat.epochs", "1", "--checkpoint.every_steps", "1"]
    words += ["--qat.freeze_batch_norm", "0.3", "--run.dir"]
    train_done(2, *words, str(tmp_path / "run"), deadline=DEADLINE)
    killed = tmp_path / "killed"
    latest = RunDir(killed).checkpoints / "latest.json"
    with train(2, *words, str(killed)) as ranks:
        saved = ranks.until(lambda: (read_json(latest) or {}).get("name", "") >= "qat-00000004", DEADLINE)
        assert saved, ranks.printed()
        ranks.kill()
    assert "qat-00000004" <= (read_json(latest) or {})["name"] < "qat-00000011", "killed on the way"
    train_done(2, *words, str(killed), deadline=DEADLINE)
    assert_same_bytes(tmp_path / "run", killed)
