"""Tests runs in shards from training to int8: equal to ddp's, and resumed on other numbers of ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from dist_train.run_dir.ledger import check
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import train, train_done

# Quantization multiplies rounding: ddp itself, clipped at 1.0000002 instead of 1, differs in the third digit of a loss
# after ten steps. So qat is short here, and begins with the same weights.
CONFIG = """
run: {name: shards, threads_per_rank: 1, device: cpu, seed: 3}
data:
  name: fake
  args: {num_train: 103, num_eval: 61, num_classes: 6, channels: 1, height: 8, width: 8}
  global_batch_size: 20
  micro_batch_size: 4
  eval_batch_size: 10
model: {name: small_resnet, args: {width: 8}}
stages: [qat, convert]
train: {epochs: 2, optim: {lr: 0.02}, clip_grad_norm: 1.0, ema_decay: 0.9, ema_samples: 40}
qat: {epochs: 1, optim: {name: adamw, lr: 0.0001}, gradient_bound: 1.0}
convert: {runtime: none, agreement_bound: 0.5}
log: {every_steps: 1}
checkpoint: {every_steps: 1}
debug: {ledger: true}
"""
CLOSE = 1e-5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    path = folder / "shards.yaml"
    path.write_text(CONFIG.replace("data:\n", f"data:\n  cache_dir: {folder / 'cache'}\n"))
    return path


def run(ranks: int, config: Path, run_dir: Path, *options: str) -> str:
    return train_done(ranks, "run", str(config), "--run.dir", str(run_dir), *options)


def series(run_dir: Path, name: str) -> torch.Tensor:
    lines = [json.loads(line) for line in RunDir(run_dir).metrics.read_text().splitlines()]
    return torch.tensor([line[name] for line in lines if name in line], dtype=torch.float64)


def product(run_dir: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = CheckpointFolder(RunDir(run_dir).checkpoints).load(f"{stage}-end")["payload"]
    return found


def assert_close(left: Path, right: Path) -> None:
    for name in ("loss", "grad_norm", "eval_loss"):
        pair = [series(each, name) for each in (left, right)]
        assert len(pair[0]), name
        torch.testing.assert_close(*pair, rtol=CLOSE, atol=CLOSE)
    results = [read_json(RunDir(each).results)["models"] for each in (left, right)]
    assert results[0].keys() == results[1].keys()
    for name, metrics in results[0].items():
        assert metrics["count"] == results[1][name]["count"] == 61
        assert metrics["top1"] == results[1][name]["top1"], name
    assert check(left).ok and check(right).ok


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["fx", "pt2e"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranges_and_int8_decisions_are_those_of_ddp(ranks: int, backend: str, config: Path, tmp_path: Path) -> None:
    options = ["--qat.backend", backend, "--compile", "false"]
    for strategy in ("ddp", "fsdp"):
        run(ranks, config, tmp_path / strategy, "--strategy", strategy, *options)
    assert_close(tmp_path / "fsdp", tmp_path / "ddp")
    ours, theirs = (product(tmp_path / strategy, "qat")["quantized"] for strategy in ("fsdp", "ddp"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=CLOSE, atol=CLOSE, msg=name)
    outputs = [product(tmp_path / strategy, "convert")["probe"]["outputs"] for strategy in ("fsdp", "ddp")]
    assert torch.equal(outputs[0].argmax(1), outputs[1].argmax(1))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        ("auto", "by 3 blocks (stages.0, stages.1, stages.2) and the rest"),
        ("['stages.?', stem]", "by 4 blocks"),
        ("[]", "as one block"),
    ],
)
def test_a_float_model_trains_by_blocks_as_under_ddp(wrap: str, said: str, config: Path, tmp_path: Path) -> None:
    stage = ["--stages", "[train]"]
    run(2, config, tmp_path / "ddp", "--strategy", "ddp", *stage)
    printed = run(2, config, tmp_path / "fsdp", "--strategy", "fsdp", "--fsdp.wrap", wrap, *stage)
    assert "train: in shards over 2 ranks, " + said in printed
    assert_close(tmp_path / "fsdp", tmp_path / "ddp")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("before", "after", "strategy"), [(2, 1, "ddp"), (3, 2, "fsdp"), (2, 3, "ddp")])
def test_a_killed_run_goes_on_with_other_ranks_and_strategies(
    before: int, after: int, strategy: str, config: Path, tmp_path: Path
) -> None:
    # Without BatchNorm, steps are equal on any number of ranks.
    stage = ["--stages", "[train]", "--model", "{name: mlp, args: {size: 8, hidden: 16}}"]
    run(after, config, tmp_path / "undisturbed", "--strategy", "ddp", *stage)
    killed = tmp_path / "killed"
    arguments = ["run", str(config), "--run.dir", str(killed), *stage]
    metrics = RunDir(killed).metrics
    with train(before, *arguments, "--strategy", "fsdp") as ranks:
        assert ranks.until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 5), ranks.printed()
        ranks.kill()
    assert CheckpointFolder(RunDir(killed).checkpoints).latest is not None
    run(after, config, killed, "--strategy", strategy, *stage)
    ledger = check(killed)
    assert ledger.ok, str(ledger)
    ours, theirs = (product(each, "train") for each in (killed, tmp_path / "undisturbed"))
    for name, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], value, rtol=CLOSE, atol=CLOSE, msg=name)
    torch.testing.assert_close(series(killed, "eval_loss")[-1:], series(tmp_path / "undisturbed", "eval_loss")[-1:])


GROUPS = "[{match: 'head.*', name: sgd, lr: 0.001}, {match: 'stages.1.*', name: Adagrad, lr: 0.0002}]"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_optimizers_by_group_train_in_shards_as_under_ddp(config: Path, tmp_path: Path) -> None:
    options = [
        "--qat.backend",
        "fx",
        "--compile",
        "false",
        "--qat.optim.groups",
        GROUPS,
        "--train.optim.groups",
        GROUPS,
    ]
    for strategy in ("ddp", "fsdp"):
        run(2, config, tmp_path / strategy, "--strategy", strategy, *options)
    assert_close(tmp_path / "fsdp", tmp_path / "ddp")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("backend", "groups"), [("pt2e", "[]"), ("fx", GROUPS)])
def test_killed_in_qat_a_run_of_three_ranks_ends_with_the_bytes_of_an_undisturbed_one(
    backend: str, groups: str, config: Path, tmp_path: Path
) -> None:
    options = ["--strategy", "fsdp", "--qat.backend", backend, "--compile", "false", "--qat.optim.groups", groups]
    run(3, config, tmp_path / "undisturbed", *options)
    killed = RunDir(tmp_path / "killed")
    checkpoints = CheckpointFolder(killed.checkpoints)
    with train(3, "run", str(config), "--run.dir", str(killed.path), *options) as ranks:
        in_qat = re.compile(r"qat-0*[2-5]")
        assert ranks.until(lambda: in_qat.fullmatch(str(checkpoints.latest)) is not None), ranks.printed()
        ranks.kill()
    assert "resuming (attempt 1) in qat at step" in run(3, config, killed.path, *options)
    assert check(killed.path).ok
    ours, theirs = (product(each, "qat")["quantized"] for each in (killed.path, tmp_path / "undisturbed"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    results = [read_json(RunDir(each).results)["models"] for each in (killed.path, tmp_path / "undisturbed")]
    assert results[0] == results[1]
