"""Tests strategy accelerate: the user's `accelerate config` applies, and training equals strategy ddp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from dist_train.distributed.world import World
from dist_train.errors import SetupError
from dist_train.strategies.accelerate import Accelerate
from dist_train.strategies.base import Strategy
from dist_train.strategies.ddp import DDP
from dist_train.strategies.single import Single
from dist_train.training.loop import fit
from tests.pipeline.test_trees_integration import command as tree_run
from tests.support.ranks import ROOT, call, free_port, train_done
from tests.support.training_loops import flat, make, mlp, normed

# As `accelerate config` writes it. MULTI_CPU without MPI would start one process only.
USERS_CONFIG = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_processes: 2
num_machines: 1
machine_rank: 0
main_process_ip: 127.0.0.1
main_process_port: {port}
use_cpu: true
mixed_precision: {precision}
"""


def launch(folder: Path, precision: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `accelerate launch` with the user's YAML on two CPU processes."""
    config = folder / "user.yaml"
    config.write_text(USERS_CONFIG.format(port=free_port(), precision=precision))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "dist_train"]
    return subprocess.run(
        [*command, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TELL": str(folder)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )


def run_arguments(folder: Path, stages: str) -> list[str]:
    settings = {
        "run.dir": str(folder / "run"),
        "data.name": "digits",
        "data.global_batch_size": "512",
        "data.workers": "0",
        "model.name": "telling",
        "strategy": "accelerate",
        "stages": stages,
        "train.epochs": "1",
        "qat.epochs": "1",
        "checkpoint.every_steps": "2",
        "debug.ledger": "true",
    }
    (folder / "config.yaml").write_text("{}\n")
    options = [text for key, value in settings.items() for text in (f"--{key}", value)]
    return ["run", str(folder / "config.yaml"), "--import", "tests.support.dtype_telling_model", *options]


@pytest.mark.slow
def test_bf16_in_the_users_accelerate_config_is_seen_in_the_forward_of_both_ranks(tmp_path: Path) -> None:
    done = launch(tmp_path, "bf16", *run_arguments(tmp_path, "[train]"))
    assert done.returncode == 0, done.stdout
    assert "precision bf16: accelerate's mixed_precision" in done.stdout
    for rank in "01":
        told = (tmp_path / rank).read_text().split("\n")
        assert {"train torch.bfloat16", "eval torch.bfloat16"} <= set(told), told
        for mode in ("eval", "train"):
            assert told.count(f"{mode} torch.float32") <= 2, (
                "the trial forward and the fingerprint before training alone"
            )
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (environment["strategy"], environment["precision"], environment["world_size"]) == ("accelerate", "bf16", 2)


@pytest.mark.slow
def test_quantization_aware_training_runs_in_the_precision_of_the_accelerate_config(tmp_path: Path) -> None:
    done = launch(tmp_path, "bf16", *run_arguments(tmp_path, "[train, ptq, qat, convert]"))
    assert done.returncode == 0, done.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["world_size"] == 2 and all(gate["passed"] for gate in results["gates"].values())
    models = results["models"]
    assert models["int8"]["top1"] == pytest.approx(models["fake_quant"]["top1"], abs=0.03)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_batches_that_are_trees_train_as_under_ddp_compiled_or_not(tmp_path: Path) -> None:
    epochs = ["--train.epochs", "2"]
    done = launch(tmp_path, "'no'", *tree_run(tmp_path, tmp_path / "accelerate", "--strategy", "accelerate", *epochs))
    assert done.returncode == 0, done.stdout
    train_done(2, *tree_run(tmp_path, tmp_path / "ddp", "--compile", "false", *epochs))
    train_done(2, *tree_run(tmp_path, tmp_path / "compiled", "--compile", "true", *epochs))
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("accelerate", "ddp", "compiled")]
    assert [each["world_size"] for each in found] == [2, 2, 2]
    for each in found[1:]:
        for name, value in each["models"]["fp32"].items():
            assert value == pytest.approx(found[0]["models"]["fp32"][name], rel=1e-5), name


def _trained(world: World, strategy: type[Strategy], precision: Any = "fp32") -> dict[str, Any]:
    model = normed()
    made = make(world, model, strategy_class=strategy, precision=precision, micro=3, config={"clip_grad_norm": 0.5})
    state = fit(made.run, None)
    buffers = {name: buffer.double().tolist() for name, buffer in model.named_buffers() if "step_" not in name}
    return {"weights": flat(model), "buffers": buffers, "losses": made.recorder.of("loss"), "metrics": state.metrics}


def side_by_side(world: World) -> dict[str, Any]:
    plain = DDP if world.world_size > 1 else Single
    threads = torch.get_num_threads()
    found: dict[str, Any] = {
        name: [_trained(world, strategy, name) for strategy in (plain, Accelerate)] for name in ("fp32", "bf16")
    }
    model = mlp()
    wrapped = Accelerate(world, "bf16").wrap(model)
    found["ddp"] = isinstance(wrapped, DistributedDataParallel)
    found["broadcasts"] = getattr(wrapped, "broadcast_buffers", False)
    found["forward is its own"] = "forward" not in vars(model)
    found["threads"] = torch.get_num_threads() == threads
    return found


def test_two_ranks_train_under_accelerate_what_they_train_under_ddp() -> None:
    for answer in call(2, "tests.strategies.test_accelerate_integration:side_by_side"):
        for precision in ("fp32", "bf16"):
            ours, theirs = answer[precision]
            assert theirs["weights"] == pytest.approx(ours["weights"], abs=1e-6)
            assert theirs["buffers"].keys() == ours["buffers"].keys() and len(ours["buffers"]) == 13
            for name, values in ours["buffers"].items():
                assert theirs["buffers"][name] == pytest.approx(values, abs=1e-6), name
            assert theirs["losses"] == pytest.approx(ours["losses"], abs=1e-6)
            assert theirs["metrics"] == pytest.approx(ours["metrics"])
            assert ours["losses"][-1] != ours["losses"][0]
        assert answer["ddp"] and answer["broadcasts"] is False
        assert answer["forward is its own"], "the model that is evaluated and exported is not patched"
        assert answer["threads"], "threads per rank stay those of the config"


def test_one_process_trains_under_accelerate_what_it_trains_alone() -> None:
    answer = side_by_side(World())
    for precision in ("fp32", "bf16"):
        ours, theirs = answer[precision]
        assert theirs["weights"] == pytest.approx(ours["weights"], abs=1e-6)
    assert not answer["ddp"] and answer["forward is its own"]


def test_fp16_which_accelerate_ignores_on_a_cpu_is_refused() -> None:
    with pytest.raises(SetupError, match=r"accelerate ignores fp16 on a CPU\n.*--mixed_precision bf16"):
        Accelerate(World(), "fp16")
