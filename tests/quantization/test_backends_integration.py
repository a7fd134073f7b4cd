"""Whole runs with the eager and fx backends on two ranks: to the artifact, and to the same one after a kill."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from dist_train.artifact.load import load_artifact
from dist_train.errors import EXIT_CONFIG
from dist_train.run_dir import state_codec as codec
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from dist_train.run_dir.paths import RunDir
from tests.support.ranks import train, train_done

CONFIG = """
run: {name: backends, threads_per_rank: 1, device: cpu}
data:
  name: fake
  args: {num_train: 203, num_eval: 61, num_classes: 6, channels: 1, height: 8, width: 8}
  global_batch_size: 20
model: {name: stub_net}
train: {epochs: 5, optim: {lr: 0.2}}
ptq: {samples: 64}
qat: {epochs: 3, optim: {lr: 0.01}, ema_decay: 0.9}
convert: {agreement_bound: 0.95}
export: {latency_batch_sizes: [1]}
checkpoint: {every_steps: 4}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "backends.yaml"
    path.write_text(CONFIG.replace("data:\n", f"data:\n  cache_dir: {tmp_path / 'cache'}\n"))
    return path


def command(config: Path, run_dir: Path, backend: str) -> list[str]:
    return [
        "run",
        str(config),
        "--run.dir",
        str(run_dir),
        "--import",
        "tests.support.one_net_all_backends",
        "--qat.backend",
        backend,
    ]


def tensors(run_dir: Path) -> dict[str, bytes]:
    """The bytes of every tensor in every checkpoint, by place."""
    folder = CheckpointFolder(RunDir(run_dir).checkpoints)
    return {
        f"{name}/{place}": tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name in folder.names()
        for place, tensor in codec.encode(folder.load(name)["payload"])[1].items()
    }


@pytest.mark.slow
def test_two_ranks_go_the_classic_way_to_an_artifact_that_is_verified(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_done(2, *command(config, run, "eager"))
    results = read_json(RunDir(run).results)
    assert all(gate["passed"] for gate in results["gates"].values())
    assert results["gates"].keys() == {"prepare", "gradients", "convert", "lowered", "artifact"}
    assert results["models"]["int8"]["count"] == 61
    assert results["models"]["int8"]["runtime"] == results["models"]["fp32"]["runtime"] == "torchscript"
    assert sorted(path.name for path in (run / "export").iterdir()) == ["manifest.json", "model.ts", "state_dict.pt"]
    model, _ = load_artifact(run / "export")
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 6)
    state = torch.load(io.BytesIO((run / "export" / "state_dict.pt").read_bytes()), weights_only=True)
    assert state["conv1.weight"].dtype == torch.qint8


def test_a_model_without_stubs_is_refused_before_it_is_trained(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with train(1, *command(config, run, "eager"), "--model.name", "small_resnet") as ranks:
        assert ranks.wait() == [EXIT_CONFIG], ranks.printed()
        assert "has no QuantStub" in ranks.output(0)
        assert "--qat.backend pt2e or fx" in ranks.output(0)
        assert "Traceback" not in ranks.output(0)
    assert not RunDir(run).metrics.exists() or "train" not in RunDir(run).metrics.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fx", "eager"])
def test_killed_in_qat_a_run_ends_with_the_bytes_of_an_undisturbed_one(
    backend: str, config: Path, tmp_path: Path
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    train_done(2, *command(config, undisturbed, backend))
    with train(2, *command(config, killed, backend)) as ranks:
        checkpoints = RunDir(killed).checkpoints
        assert ranks.until((checkpoints / "qat-00000016").exists), ranks.printed()
        ranks.kill()
    assert "qat-end" not in CheckpointFolder(checkpoints).names()
    train_done(2, *command(config, killed, backend))
    expected, found = tensors(undisturbed), tensors(killed)
    assert found.keys() == expected.keys()
    assert [place for place in expected if found[place] != expected[place]] == []
    for file in ("model.ts", "state_dict.pt", "manifest.json"):
        assert (killed / "export" / file).read_bytes() == (undisturbed / "export" / file).read_bytes()
