"""A checkpoint's tree that its writer never made ends in our error, before memory is asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dist_train.errors import CheckpointError
from dist_train.run_dir import state_codec as codec
from dist_train.run_dir.checkpoint import CheckpointFolder
from tests.support.crafted import MOST_MEGABYTES, refusal

TENSORS = {"w": torch.arange(12.0), "two": torch.zeros(3, 4), "b": torch.zeros(4, dtype=torch.uint8)}


def tensor(name: Any = "w", shape: Any = (3, 4), stride: Any = (4, 1)) -> dict[str, Any]:
    listed = [list(each) if isinstance(each, tuple) else each for each in (shape, stride)]
    return {"$tensor": name, "shape": listed[0], "stride": listed[1]}


CRAFTED = {
    "strides beyond the tensor": tensor(stride=(10**9, 1)),
    "strides that repeat one element": tensor(shape=(10**9,), stride=(0,)),
    "negative strides": tensor(stride=(-4, 1)),
    "a shape beyond the tensor": tensor(shape=(10**9, 10**9)),
    "a shape beyond 64 bits": tensor(shape=(10**30,), stride=(1,)),
    "a part of a tensor": tensor(shape=(2, 4)),
    "fewer strides than sizes": tensor(stride=(1,)),
    "sizes that are no numbers": tensor(shape=("3", 4)),
    "sizes that are booleans": tensor(shape=(True, 12), stride=(12, 1)),
    "no list of sizes": tensor(shape=7),
    "no strides": {"$tensor": "w", "shape": [12]},
    "a name that is not there": tensor(name="../../etc/passwd"),
    "a name that is no text": tensor(name=["w"]),
    "a tensor that is not flat": tensor(name="two"),
    "bytes of floats": {"$bytes": tensor(shape=(12,), stride=(1,))},
    "bytes of no tensor": {"$bytes": {"a": 1}},
    "a key that is a list": {"$dict": [[[1, 2], 3]]},
    "a key that is a dict": {"$counter": [[{"a": 1}, 3]]},
    "pairs of three": {"$dict": [[1, 2, 3]]},
    "pairs that are none": {"$dict": 7},
    "a float that is none": {"$float": "zero"},
    "a float of a list": {"$float": []},
    "a tuple of none": {"$tuple": 7},
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_tree_that_was_never_written_is_refused_in_words(name: str) -> None:
    with pytest.raises(CheckpointError, match="is not what was written"):
        codec.decode({"model": [CRAFTED[name]]}, TENSORS)


def test_the_tensors_of_these_trees_are_read_otherwise() -> None:
    found = codec.decode({"t": tensor(), "b": {"$bytes": tensor("b", (4,), (1,))}}, TENSORS)
    assert found["t"].shape == (3, 4)
    assert found["b"] == bytes(4)


def plant(folder: Path, state: str) -> None:
    """Writes a checkpoint of these characters, whose hashes are right."""
    CheckpointFolder(folder).save("train-1", {"step": 1})
    target = folder / "train-1"
    (target / "state.json").write_text(state)
    (target / "tensors.safetensors").write_bytes(safetensors.torch.save({"w": TENSORS["w"]}))
    files = {
        name: hashlib.sha256((target / name).read_bytes()).hexdigest() for name in ("tensors.safetensors", "state.json")
    }
    own = hashlib.sha256(json.dumps(["train-1", files]).encode()).hexdigest()
    (target / "manifest.json").write_text(json.dumps({"name": "train-1", "sha256": files, "manifest_sha256": own}))


@pytest.mark.parametrize(
    "state",
    [
        '{"format": 2, "state": ' + json.dumps(tensor(shape=(10**9, 10**9))) + "}",
        '{"format": 2, "state": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"format": 2, "state": [' + "[]," * 5_000_000 + "[]]}",
        '{"format": 2, "state": "' + "x" * (64 * 2**20) + '"}',
        '{"format": 2, "state": ' + "9" * 5000 + "}",
    ],
    ids=["shape", "levels", "values", "text", "digits"],
)
def test_a_crafted_checkpoint_takes_little_memory(tmp_path: Path, state: str) -> None:
    plant(tmp_path, state)
    found = refusal(
        "from pathlib import Path; from dist_train.run_dir.checkpoint import CheckpointFolder",
        "CheckpointFolder(Path(sys.argv[1])).load('train-1')",
        tmp_path,
    )
    assert found.kind == "CheckpointError", found
    assert found.megabytes < MOST_MEGABYTES


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_a_state_that_could_not_be_read_again_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for state in (nested(100), nested(2000), list(range(1_000_001)), "x" * (17 * 2**20)):
        with pytest.raises(CheckpointError, match="a checkpoint cannot hold the state"):
            folder.save("train-1", state)
    assert folder.latest is None


def test_the_largest_state_that_is_saved_is_read_again(tmp_path: Path) -> None:
    state = [nested(98), list(range(900_000))]
    CheckpointFolder(tmp_path).save("train-1", state)
    assert CheckpointFolder(tmp_path).load("train-1") == state
