"""Tests `accelerate launch` with an FSDP2 config: it trains in shards, as `strategy: fsdp` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.files import read_json
from dist_train.run_dir.ledger import check
from dist_train.run_dir.paths import RunDir
from tests.strategies.test_fsdp_runs_integration import CONFIG, product, run, series
from tests.support.elastic_job import Node
from tests.support.ranks import free_port

# As `accelerate config` writes it for FSDP2, on CPUs, where accelerate itself would not shard.
USERS_CONFIG = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
enable_cpu_affinity: false
fsdp_config:
  fsdp_activation_checkpointing: false
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: {reshard}
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_version: {version}
{policy}
machine_rank: 0
main_process_ip: 127.0.0.1
main_process_port: {port}
main_training_function: main
mixed_precision: '{precision}'
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: true
"""
BLOCKS = "  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n  fsdp_transformer_layer_cls_to_wrap: _Block"
SIZES = "  fsdp_auto_wrap_policy: SIZE_BASED_WRAP\n  fsdp_min_num_params: 500"
CLOSE = 1e-6
TRAIN = ["--stages", "[train]"]


# By this variable transformers leaves weights of all ranks but a node's first to accelerate, which is not asked here.
OWN_MODEL = """
import os
import dist_train
from dist_train.models.small import small_resnet

@dist_train.register_model("own")
def own(num_classes, in_channels, width):
    assert os.environ["ACCELERATE_USE_FSDP"] == "true" and "FSDP_CPU_RAM_EFFICIENT_LOADING" not in os.environ
    return small_resnet(num_classes, in_channels, width)
"""


class Launches:
    """Runs of one configuration, in folders beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "config.yaml"
        self.config.write_text(CONFIG.replace("data:\n", f"data:\n  cache_dir: {folder / 'cache'}\n"))
        self._nodes: list[Node] = []

    def start(self, name: str, settings: Sequence[str] = (), policy: str = BLOCKS, **options: str) -> Node:
        """Starts `accelerate launch` on two processes, with an FSDP config."""
        given = {"version": "2", "reshard": "true", "precision": "no", **options}
        file = self.folder / f"{name}-accelerate.yaml"
        file.write_text(USERS_CONFIG.format(port=free_port(), policy=policy, **given))
        words = ["accelerate.commands.launch", "--config_file", str(file), "-m", "dist_train", "run", str(self.config)]
        words += ["--run.dir", str(self.folder / name), "--strategy", "accelerate", *settings]
        self._nodes.append(Node(name, words, self.folder))
        return self._nodes[-1]

    def done(self, name: str, settings: Sequence[str] = (), policy: str = BLOCKS, **options: str) -> str:
        node = self.start(name, settings, policy, **options)
        assert node.process.wait(300) == 0, node.printed()
        return node.printed()

    def by_fsdp(self, *settings: str) -> Path:
        """Runs the same under `strategy: fsdp`."""
        run(2, self.config, self.folder / "fsdp", "--strategy", "fsdp", *settings)
        return self.folder / "fsdp"

    def end(self) -> None:
        for node in self._nodes:
            node.kill()


@pytest.fixture
def launches(tmp_path: Path) -> Iterator[Launches]:
    made = Launches(tmp_path)
    yield made
    made.end()


def assert_alike(left: Path, right: Path) -> None:
    for name in ("loss", "grad_norm", "eval_loss"):
        pair = [series(each, name) for each in (left, right)]
        assert len(pair[0]), name
        torch.testing.assert_close(*pair, rtol=CLOSE, atol=CLOSE)
    assert check(left).ok and check(right).ok


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_float_and_quantization_aware_training_are_those_of_fsdp(launches: Launches) -> None:
    settings = ["--compile", "false", "--stages", "[train, qat, convert]"]
    printed = launches.done("accelerate", settings)
    line = "strategy accelerate runs as fsdp: FSDP2 in the accelerate config, with fsdp.wrap [{type: _Block}]"
    assert printed.count(line) == 1
    assert "train: in shards over 2 ranks, by 3 blocks" in printed and "qat: in shards over 2 ranks" in printed
    ours, theirs = launches.folder / "accelerate", launches.by_fsdp("--fsdp.wrap", "[{type: _Block}]", *settings)
    assert_alike(ours, theirs)
    found = read_json(RunDir(ours).environment)
    assert (found["strategy"], found["world_size"]) == ("fsdp", 2)
    results = [read_json(RunDir(each).results)["models"] for each in (ours, theirs)]
    assert results[0].keys() == results[1].keys() >= {"fp32", "fake_quant", "int8"}
    for name, metrics in results[1].items():
        assert results[0][name]["top1"] == metrics["top1"], name


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sizes_precision_and_blocks_that_stay_whole_are_taken_from_the_accelerate_config(launches: Launches) -> None:
    (launches.folder / "own_model.py").write_text(OWN_MODEL)
    own = [*TRAIN, "--import", "own_model", "--model.name", "own"]
    printed = launches.done("accelerate", own, SIZES, reshard="false", precision="bf16")
    assert "precision bf16: accelerate's mixed_precision" in printed
    assert "fsdp.wrap {min_params: 500}, fsdp.reshard_after_forward false" in printed
    theirs = launches.by_fsdp(*TRAIN, "--precision", "bf16", "--fsdp.wrap", "{min_params: 500}")
    assert_alike(launches.folder / "accelerate", theirs)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_launch_goes_on_and_ends_with_the_bytes_of_an_undisturbed_one(launches: Launches) -> None:
    launches.done("undisturbed", TRAIN)
    killed = RunDir(launches.folder / "killed")
    node = launches.start("killed", TRAIN)
    while not (killed.metrics.exists() and killed.metrics.read_text().count("\n") >= 5):
        assert node.process.poll() is None, node.printed()
    node.kill()
    assert CheckpointFolder(killed.checkpoints).latest is not None
    printed = launches.done("killed", TRAIN)
    assert "resuming (attempt 1) in train" in printed
    assert check(killed.path).ok
    ours, theirs = (product(launches.folder / name, "train")["model"] for name in ("killed", "undisturbed"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.slow
def test_fsdp1_is_refused_before_any_rank_waits(launches: Launches) -> None:
    node = launches.start("first", TRAIN, version="1", reshard="FULL_SHARD")
    assert node.process.wait(120) != 0
    assert "the accelerate config asks for FSDP1, which strategy accelerate does not train with" in node.printed()
    assert "accelerate to-fsdp2 --config_file FILE" in node.printed()
    assert not (launches.folder / "first").exists()
