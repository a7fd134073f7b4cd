"""Whole runs with groups, frozen parts, schedules of torch's and an average: killed, resumed, equal to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.pipeline.test_exactness_integration import assert_same_result, command, latest
from tests.support.ranks import train, train_done

CONFIG = """
run: {name: parts, threads_per_rank: 1, device: cpu}
data:
  name: fake
  args: {num_train: 120, num_eval: 61, num_classes: 10, channels: 1, height: 8, width: 8}
  global_batch_size: 24
model: {name: small_resnet, args: {width: 4, blocks: 1}}
train:
  epochs: 2
  freeze: ["stem", {type: BatchNorm2d}]
  unfreeze_at: 1
  optim: {lr: 0.05, weight_decay: 0.0005, groups: [{match: head, lr: 0.2, weight_decay: 0}, {match: "*.bias", lr: 0.1}]}
  schedule: {name: OneCycleLR, warmup: 0.1}
  activation_checkpointing: "stages.0"
  ema_decay: 0.9
ptq: {samples: 64}
convert: {runtime: none, agreement_bound: 0.5}
qat:
  epochs: 2
  freeze: ["stem.*"]
  unfreeze_at: 1
  optim: {name: NAdam, lr: 0.0005, args: {decoupled_weight_decay: true}, groups: [{match: head, lr: 0.001}]}
  schedule: {name: ReduceLROnPlateau, metric: loss, args: {patience: 0}}
  ema_decay: 0.9
export: {latency: false}
checkpoint: {every_steps: 1}
debug: {ledger: true}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "parts.yaml"
    path.write_text(CONFIG.replace("data:\n", f"data:\n  cache_dir: {tmp_path / 'cache'}\n"))
    return path


def has_reached(run_dir: Path, moment: str) -> bool:
    newest = latest(run_dir) or ""
    return newest.partition("-")[0] == moment.partition("-")[0] and newest >= moment


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_killed_before_and_after_the_unfreezing_a_run_ends_like_an_undisturbed_one(config: Path) -> None:
    undisturbed, killed = config.parent / "undisturbed", config.parent / "killed"
    printed = train_done(2, *command(config, undisturbed))
    assert "train: freezes 7 parameters and the statistics of 3 batch norms until epoch 1" in printed, printed
    assert "train: epoch 2/2: unfreezes 7 parameters" in printed and "qat: epoch 2/2: unfreezes 3" in printed
    found = []
    for moment in ("train-00000002", "train-00000006", "qat-00000007"):
        with train(2, *command(config, killed)) as ranks:
            assert ranks.until(lambda moment=moment: has_reached(killed, moment)), ranks.printed()
            ranks.kill()
        found.append(latest(killed))
    assert (
        found[0] is not None and found[0] < "train-00000010" and found[1] is not None and found[1] > "train-00000004"
    ), found
    train_done(2, *command(config, killed))
    assert read_json(RunDir(killed).status)["restarts"] == 3
    assert_same_result(undisturbed, killed)


@pytest.mark.slow
def test_patterns_of_nothing_end_all_ranks_before_they_wait(config: Path) -> None:
    wrong = ["--train.freeze", "[stm.*]", "--qat.optim.groups", "[{match: heads, lr: 0.1}]", "--run.timeout", "60"]
    with train(2, *command(config, config.parent / "wrong"), *wrong) as ranks:
        assert ranks.wait(60) == [78, 78], ranks.printed()
        printed = ranks.printed()
    assert "train.freeze.0" in printed and "did you mean stem.*" in printed
    assert "qat.optim.groups.0.match" in printed and "did you mean head" in printed and "Traceback" not in printed
