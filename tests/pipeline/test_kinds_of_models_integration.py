"""Each kind of model goes from float to int8 on 1 and 2 ranks; killed and resumed, it ends with the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_train
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.pipeline.test_exactness_integration import assert_same_result
from tests.support.ranks import train, train_done

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONFIG: dict[str, Any] = {
    "run": {"name": "kind", "threads_per_rank": 1, "device": "cpu"},
    "stages": ["train", "ptq", "qat", "convert", "export"],
    "train": {"epochs": 2, "optim": {"name": "adamw", "lr": 0.01}},
    "qat": {"epochs": 1, "optim": {"name": "adamw", "lr": 0.001}},
    "export": {"latency": False},
    "compile": False,
    "checkpoint": {"every_steps": 1},
    "log": {"every_steps": 1},
    "debug": {"ledger": True},
}
ROWS = {"global_batch_size": 12, "workers": 0}
SENSOR = {"name": "kinds_sensor", **ROWS}
LANGUAGES = {"source": "generated", "languages": ["one", "two"], "per_language": 40, "max_length": 12}
KINDS: dict[str, dict[str, Any]] = {
    "text": {
        "data": {"name": "languages", "args": LANGUAGES, **ROWS},
        "model": {"name": "text_transformer", "args": {"width": 16, "depth": 1, "heads": 2, "max_length": 12}},
        "export": {"formats": ["onnx"], "latency": False},
    },
    "table": {
        "data": {"name": "kinds_table", **ROWS},
        "model": {"name": "kinds_table"},
        "task": {"name": "regression"},
        "export": {"formats": ["onnx"], "latency": False},
    },
    "sensor": {"data": SENSOR, "model": {"name": "kinds_sensor"}},
    "unet": {
        "data": {"name": "noisy_images", "args": {"num_train": 48}, **ROWS},
        "model": {"name": "unet", "args": {"width": 4}},
        "task": {"name": "regression"},
    },
    "detector": {
        "data": {"name": "shapes", "args": {"num_train": 34, "num_eval": 13, "size": 32}, **ROWS},
        "model": {"name": "small_ssd", "args": {"width": 4}},
        "task": {"name": "detection"},
        "convert": {"agreement_bound": 0.8},
    },
    "several_inputs": {"data": {"name": "kinds_pair", **ROWS}, "model": {"name": "kinds_pair"}},
    "frozen": {
        "data": SENSOR,
        "model": {"name": "kinds_backbone"},
        "train": {"freeze": ["backbone.*"], **CONFIG["train"]},
    },
    "tied": {
        "data": {"name": "kinds_vectors", **ROWS},
        "model": {"name": "kinds_tied"},
        "task": {"name": "regression"},
    },
    "own_backward": {"data": SENSOR, "model": {"name": "kinds_signs", "args": {"own": False}}},
}

WITH_EMBEDDINGS = ("text", "table")  # which stay in floating point


def command(folder: Path, kind: dict[str, Any], run_dir: Path, *settings: str) -> list[str]:
    path = folder / "kind.json"
    path.write_text(json.dumps(CONFIG | kind))
    return ["run", str(path), "--import", "tests.support.kinds_of_models", "--run.dir", str(run_dir), *settings]


def steps(run_dir: Path, stage: str) -> int:
    """Steps of a stage that the run's log holds."""
    path = RunDir(run_dir).metrics
    logged = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return sum(line.get("stage") == stage and "loss" in line for line in logged)


def weights(run_dir: Path, stage: str) -> dict[str, torch.Tensor]:
    """Parameters and statistics at a stage's end, by name."""
    payload = CheckpointFolder(RunDir(run_dir).checkpoints).load(f"{stage}-end")["payload"]
    found: dict[str, torch.Tensor] = payload["model" if stage == "train" else "quantized"]
    return found


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_model_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    kind, killed_in = KINDS[name], ("train", "qat")[list(KINDS).index(name) % 2]
    alone, whole, killed = (tmp_path / each for each in ("alone", "whole", "killed"))
    for ranks, run_dir in ((1, alone), (2, whole)):
        train_done(ranks, *command(tmp_path, kind, run_dir))
        results = read_json(RunDir(run_dir).results)
        assert {"prepare", "gradients", "convert", "lowered", "artifact"} <= results["gates"].keys()
        assert all(gate["passed"] for gate in results["gates"].values()), results["gates"]
        assert {"fp32", "ptq", "fake_quant", "int8"} == results["models"].keys()
        least = 0.3 if name in WITH_EMBEDDINGS else 0.99
        assert results["models"]["int8"]["weights"]["share"] > least
        dist_train.load_artifact(RunDir(run_dir).export)
    with train(2, *command(tmp_path, kind, killed)) as ranks:
        assert ranks.until(lambda: steps(killed, killed_in) >= 2), ranks.printed()
        ranks.kill()
    status = read_json(RunDir(killed).status)
    assert (status["stage"], status["state"] != "done") == (killed_in, True)
    train_done(2, *command(tmp_path, kind, killed))
    assert_same_result(whole, killed)
    promise = PROMISES.get(name)
    if promise is not None:
        promise(alone, whole)


def stays_frozen(alone: Path, whole: Path) -> None:
    """Checks that what is frozen, statistics too, has the same bits after train and qat, on 1 and on 2 ranks."""
    first, *others = [weights(run_dir, stage) for run_dir in (alone, whole) for stage in ("train", "qat")]
    frozen = [name for name in first if name.startswith("backbone.")]
    assert len(frozen) == 6 and first["backbone.1.num_batches_tracked"] == 0
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in frozen)
        assert not torch.equal(first["head.3.weight"], other["head.3.weight"])


def stays_tied(alone: Path, whole: Path) -> None:
    """Checks that there is one weight after train, and one after qat, which learned there."""
    for run_dir in (alone, whole):
        trained, quantized = weights(run_dir, "train"), weights(run_dir, "qat")
        assert torch.equal(trained["encoder.weight"], trained["decoder.weight"])
        assert [name for name in quantized if name.endswith(".weight")] == ["encoder.weight"]
        assert not torch.equal(trained["encoder.weight"], quantized["encoder.weight"])


PROMISES: dict[str, Callable[[Path, Path], None]] = {"frozen": stays_frozen, "tied": stays_tied}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_backward_of_its_own_is_refused_before_training_and_kept_in_training_alone(
    ranks: int, tmp_path: Path
) -> None:
    kind = KINDS["own_backward"]
    own = {**kind, "model": {"name": "kinds_signs", "args": {"own": True}}}
    with train(ranks, *command(tmp_path, own, tmp_path / "refused")) as started:
        assert 0 not in started.wait()
        said = started.output(0)
    assert "it has the autograd.Function SignSTE, whose backward is its own" in said
    assert "write SignSTE in functions that torch differentiates, as x + (y - x).detach()" in said
    assert steps(tmp_path / "refused", "train") == 0
    alone = ["--stages", "[train]", "--train.optim.name", "sgd"]
    for name, each in (("own", own), ("torch", kind)):
        train_done(ranks, *command(tmp_path, each, tmp_path / name, *alone))
    kept, expected = weights(tmp_path / "own", "train"), weights(tmp_path / "torch", "train")
    for name in expected:
        torch.testing.assert_close(kept[name], expected[name], rtol=1e-3, atol=1e-4)
