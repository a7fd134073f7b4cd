"""Kills runs at any moment and resumes them: tensors, ledger and artifact equal an undisturbed run's."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.run_dir import state_codec as codec
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from dist_train.run_dir.ledger import check, read_steps
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import train, train_done

CONFIG = """
run: {name: exact, threads_per_rank: 1, device: cpu}
data:
  name: fake
  args: {num_train: 403, num_eval: 61, num_classes: 10, channels: 1, height: 8, width: 8}
  global_batch_size: 24
  micro_batch_size: 5
  augment: [{name: random_crop, padding: 1}, {name: random_horizontal_flip}]
model: {name: small_resnet, args: {width: 4, blocks: 1}, channels_last: true}
train:
  epochs: 4
  optim: {lr: 0.05, weight_decay: 0.0005}
  schedule: {name: cosine, warmup: 0.1}
  clip_grad_norm: 1.0
  ema_decay: 0.9
  select: best
ptq: {samples: 64}
convert: {runtime: none}
qat: {epochs: 3, optim: {name: adamw, lr: 0.0005}}
export: {latency: false}
checkpoint: {every_steps: 4}
debug: {ledger: true}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exact")
    path = folder / "exact.yaml"
    path.write_text(CONFIG.replace("data:\n", f"data:\n  cache_dir: {folder / 'cache'}\n"))
    return path


def command(config: Path, run_dir: Path) -> list[str]:
    return ["run", str(config), "--run.dir", str(run_dir)]


def bytes_of(value: Any) -> dict[str, tuple[str, bytes]]:
    """Returns every tensor of a nested state, by its place: description and bytes."""
    _, tensors = codec.encode(value)
    return {
        name: (f"{tensor.dtype} {tuple(tensor.shape)}", tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def ids_by_step(run_dir: Path) -> dict[tuple[str, int], list[tuple[int, list[int]]]]:
    return {key: [(line["epoch"], line["ids"]) for line in lines] for key, lines in read_steps(run_dir).items()}


def assert_same_result(left: Path, right: Path) -> None:
    folders = [CheckpointFolder(RunDir(path).checkpoints) for path in (left, right)]
    assert folders[0].names() == folders[1].names()
    for name in folders[0].names():
        states = [bytes_of(folder.load(name)["payload"]) for folder in folders]
        assert states[0].keys() == states[1].keys()
        different = [place for place in states[0] if states[0][place] != states[1][place]]
        assert not different, f"{name}: {different}"
    assert ids_by_step(left) == ids_by_step(right)
    assert check(left).ok and check(right).ok, (str(check(left)), str(check(right)))
    for file in ("model.pt2", "manifest.json"):
        assert (left / "export" / file).read_bytes() == (right / "export" / file).read_bytes()
    results = [read_json(RunDir(path).results) for path in (left, right)]
    assert results[0]["models"] == results[1]["models"]


def lines(run_dir: Path) -> int:
    """Returns the number of lines in metrics.jsonl: the run's progress."""
    path = RunDir(run_dir).metrics
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("world_size", "shares", "strategy"),
    [
        pytest.param(2, [(0.2, 0.3), (0.45, 0.55)], "ddp", marks=pytest.mark.slow),
        pytest.param(3, [(0.1, 0.5)] * 6, "ddp", marks=pytest.mark.slow),
        pytest.param(2, [(0.2, 0.3), (0.45, 0.55)], "fsdp", marks=pytest.mark.slow),
        pytest.param(3, [(0.1, 0.5)] * 6, "fsdp", marks=pytest.mark.slow),
    ],
    ids=["2", "3", "2-fsdp", "3-fsdp"],
)
def test_killed_at_random_moments_a_run_ends_like_an_undisturbed_one(
    world_size: int, shares: list[tuple[float, float]], strategy: str, config: Path, tmp_path: Path
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    options = ["--strategy", strategy]
    train_done(world_size, *command(config, undisturbed), *options, cold=True)
    total = lines(undisturbed)
    draw = random.Random(world_size)
    hit = []
    for attempt, share in enumerate(shares):
        with train(world_size, *command(config, killed), *options) as ranks:
            opened = ranks.until(
                lambda attempt=attempt: (read_json(RunDir(killed).status) or {}).get("restarts") == attempt
            )
            assert opened, ranks.printed()
            # Kills follow the run's progress, at any speed; every other one kills a single rank.
            goal = lines(killed) + draw.uniform(*share) * total
            ranks.until(lambda goal=goal: lines(killed) >= goal)
            time.sleep(draw.uniform(0, 0.2))
            status = read_json(RunDir(killed).status)
            hit.append(status["stage"])
            if status["state"] == "done":
                break
            victims = None if attempt % 2 == 0 else [draw.randrange(world_size)]
            ranks.kill(victims)
            start = time.monotonic()
            ranks.wait(60)
            assert time.monotonic() - start < 40
    assert len(set(hit)) >= 2, hit
    train_done(world_size, *command(config, killed), *options)
    assert_same_result(undisturbed, killed)


# Ten steps of QAT, a checkpoint after each: BatchNorm freezes before step 3, the ranges before step 5.
BOUNDARIES = CONFIG.replace("num_train: 403", "num_train: 240")
BOUNDARIES = BOUNDARIES.replace("epochs: 4", "epochs: 1").replace("{epochs: 3, ", "{epochs: 1, ")
BOUNDARIES = BOUNDARIES.replace("every_steps: 4", "every_steps: 1")


def latest(run_dir: Path) -> str | None:
    return CheckpointFolder(RunDir(run_dir).checkpoints).latest


def at_work_on(run_dir: Path) -> str | None:
    return (read_json(RunDir(run_dir).status) or {}).get("stage")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_before_and_after_every_boundary_a_run_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    config, undisturbed, killed = tmp_path / "exact.yaml", tmp_path / "undisturbed", tmp_path / "killed"
    config.write_text(BOUNDARIES.replace("data:\n", f"data:\n  cache_dir: {tmp_path / 'cache'}\n"))
    train_done(2, *command(config, undisturbed), cold=True)
    moments: dict[str, Callable[[], bool]] = {
        "ptq": lambda: at_work_on(killed) == "ptq",
        **{
            name: lambda name=name: latest(killed) == name  # type: ignore[misc]
            for name in ("ptq-end", "qat-00000003", "qat-00000004", "qat-00000006", "qat-end")
        },
        "convert-end": lambda: latest(killed) == "convert-end",
        "export": lambda: (killed / "export" / "manifest.json").exists(),
        "export-end": lambda: latest(killed) == "export-end",
    }
    found: list[Any] = []
    for moment, reached in moments.items():
        with train(2, *command(config, killed)) as ranks:
            assert ranks.until(reached), f"{moment}: {ranks.printed()}"
            ranks.kill()
        found.append(latest(killed))
    # A kill may come one step later than intended, but not past the next boundary.
    assert found[0] == "train-end" and found[1] in ("ptq-end", "qat-00000001")
    assert [name[:5] for name in found[2:5]] == ["qat-0"] * 3 and "qat-00000010" not in found
    assert found[5:] == ["qat-end", "convert-end", "convert-end", "export-end"]
    train_done(2, *command(config, killed))
    assert_same_result(undisturbed, killed)
