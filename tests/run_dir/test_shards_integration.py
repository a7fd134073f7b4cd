"""Checkpoints of shards: saved on some ranks, read on others or on one, damaged, failing and killed, on real ranks."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from dist_train.errors import CheckpointError, DamagedCheckpointError
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.saved import SHARDED_FORMAT
from tests.support.ranks import Ranks, call
from tests.support.shard_ranks import state_of

SUPPORT = "tests.support.shard_ranks"
FIRST, SECOND, END = "train-00000001", "train-00000002", "warm-end"
RANK0, RANK1 = "shards-rank0.safetensors", "shards-rank1.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The end of a stage and two steps of the next one, saved on two ranks."""
    path = tmp_path_factory.mktemp("saved") / "checkpoints"
    call(2, f"{SUPPORT}:save", str(path), 2)
    return path


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def same(found: Any, step: int) -> None:
    torch.testing.assert_close(found["payload"], state_of(step), rtol=0, atol=0)


def test_each_rank_writes_its_shards_and_one_process_reads_them_whole(path: Path) -> None:
    folder = CheckpointFolder(path)
    files = ["manifest.json", RANK0, RANK1, "state.json", "tensors.safetensors"]
    assert sorted(each.name for each in (path / FIRST).iterdir()) == files
    assert folder.latest == SECOND and folder.names() == [FIRST, SECOND, END]
    assert not list(path.glob(".*")), "nothing is left of what the ranks handed over"
    for name, step in ((FIRST, 1), (SECOND, 2), (END, 0)):
        found = folder.load(name)
        same(found, step)
        weights = found["payload"]["model"]
        assert weights["tied.weight"].data_ptr() == weights["first.weight"].data_ptr()
    assert json.loads((path / FIRST / "state.json").read_bytes())["format"] == SHARDED_FORMAT
    with safe_open(path / FIRST / RANK1, "pt") as opened:
        assert {each: opened.metadata()[each] for each in ("checkpoint", "rank", "world_size")} == {
            "checkpoint": FIRST,
            "rank": "1",
            "world_size": "2",
        }
        place = json.loads(opened.metadata()["DCP_SHARDING_INFO"])["state.payload.model.first.weight"]
    assert place == {"saved_offsets": [4, 0], "shape": [7, 5], "mesh": [2], "placements": [0]}


def test_torch_reads_the_files_without_us(path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    expected = state_of(1)
    prefix = "state.payload.model."
    found = {prefix + name: torch.zeros_like(expected["model"][name]) for name in ("first.weight", "conv.bias")}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(path / FIRST)), no_dist=True)
    assert all(torch.equal(each, expected["model"][name.removeprefix(prefix)]) for name, each in found.items())


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swapped(path: Path) -> None:
    aside = path.with_name("aside")
    path.rename(aside)
    path.with_name(RANK0).rename(path)
    aside.rename(path.with_name(RANK0))


def of_another_save(path: Path) -> None:
    shutil.copy(path.parents[1] / FIRST / path.name, path)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed": (flipped, "does not have the recorded SHA-256"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "does not have the recorded SHA-256"),
    "empty": (lambda path: path.write_bytes(b""), "does not have the recorded SHA-256"),
    "missing": (lambda path: path.unlink(), r"is incomplete: .*No such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is incomplete: .*Is a directory"),
    "of another save": (of_another_save, f"it holds the shards of rank 1 of the checkpoint {FIRST}"),
    "swapped between ranks": (swapped, f"it holds the shards of rank [01] of the checkpoint {SECOND}"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_shards_are_told_in_words_and_the_older_checkpoint_is_taken(name: str, path: Path) -> None:
    damage, words = DAMAGE[name]
    folder = CheckpointFolder(path)
    damage(path / SECOND / RANK1)
    with pytest.raises(DamagedCheckpointError, match=words):
        folder.load(SECOND)
    usable, wrong = folder.inspect(SECOND)
    assert not usable and list(wrong) == [SECOND] and SECOND in wrong[SECOND]
    found, state = folder.load_newest()
    assert found == FIRST
    same(state, 1)
    # Two ranks share the files: rank 1 finds it, and rank 0 where its own are wrong, too.
    found_by = [not folder.inspect(SECOND, (rank, 2))[0] for rank in range(2)]
    assert found_by == [name == "swapped between ranks", True]
    assert folder.set_aside(SECOND) == f"damaged-{SECOND}"


def test_damaged_shards_of_a_stages_end_are_read_from_its_copy_and_replaced(path: Path) -> None:
    folder = CheckpointFolder(path)
    flipped(path / END / RANK1)
    same(folder.load(END), 0)
    usable, wrong = folder.inspect(END)
    assert usable and RANK1 in wrong[END]
    folder.set_aside(END)
    shutil.rmtree(path / f"copy-of-{END}")
    assert folder.inspect(END) == (True, {})
    same(folder.load(END), 0)


def crafted(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the tree of a checkpoint as its writer never would, with hashes that are right."""
    import hashlib

    from dist_train.run_dir.saved import manifest_bytes

    document = json.loads((path / "state.json").read_bytes())
    change(document)
    (path / "state.json").write_text(json.dumps(document))
    files = {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in path.iterdir()}
    del files["manifest.json"]
    (path / "manifest.json").write_bytes(manifest_bytes(path.name, files))


def entry(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["state"]["payload"]["model"]["first.weight"]
    return found


CRAFTED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a shape beyond the shards": lambda document: entry(document).update(shape=[10**9, 10**9], stride=[10**9, 1]),
    "a shape of which there is a part": lambda document: entry(document).update(shape=[6, 5]),
    "strides that overlap": lambda document: entry(document).update(stride=[0, 1]),
    "another dtype": lambda document: entry(document).update(dtype="float64"),
    "a dtype that is none": lambda document: entry(document).update(dtype="load"),
    "a name that is not there": lambda document: entry(document).update({"$shards": "../x"}),
    "a name that is no text": lambda document: entry(document).update({"$shards": ["x"]}),
    "more ranks": lambda document: document.update(world_size=10**12),
    "no ranks": lambda document: document.pop("world_size"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_tree_that_was_never_written_is_refused_in_words(name: str, path: Path) -> None:
    crafted(path / FIRST, CRAFTED[name])
    with pytest.raises(CheckpointError, match=r"is not what was written|does not list the shards"):
        CheckpointFolder(path).load(FIRST)


def test_no_file_is_unpickled_and_a_stray_one_is_not_read(path: Path) -> None:
    (path / FIRST / ".metadata").write_bytes(b"cos\nabort\n(tR.")
    name = "state.payload.model.first.weight"
    safetensors.torch.save_file({name: torch.zeros(7, 5)}, path / FIRST / "more.safetensors")
    same(CheckpointFolder(path).load(FIRST), 1)


@pytest.mark.heavy
def test_another_number_of_ranks_reads_its_slices_and_no_more(path: Path) -> None:
    for found in call(3, f"{SUPPORT}:read", str(path), FIRST, 1):
        assert found["read"] == found["own"]
        assert "state.x is a DTensor with the placement" in found["refused"]


@pytest.mark.slow
@pytest.mark.parametrize(("writers", "readers"), [(4, 4), (4, 3), (4, 2), (2, 4)])
def test_any_number_of_ranks_reads_what_any_other_wrote(writers: int, readers: int, tmp_path: Path) -> None:
    call(writers, f"{SUPPORT}:save", str(tmp_path))
    same(CheckpointFolder(tmp_path).load(FIRST), 1)
    for found in call(readers, f"{SUPPORT}:read", str(tmp_path), FIRST, 1):
        assert found["read"] == found["own"]


@pytest.mark.slow
def test_disks_that_fail_for_a_moment_or_for_good(tmp_path: Path) -> None:
    said = call(2, f"{SUPPORT}:faults", str(tmp_path))
    for case in said[0]:
        folder = CheckpointFolder(tmp_path / case)
        lasting = "stays" in case
        assert folder.latest == (FIRST if lasting else SECOND), (case, said)
        same(folder.load(FIRST if lasting else SECOND), 1 if lasting else 2)
        assert not list((tmp_path / case).glob(".*")), case
        if lasting:
            assert "rank 1: cannot write the checkpoint" in said[0][case] and "No space left" in said[0][case]
            assert said[1][case].startswith("cannot write the checkpoint") and "No space left" in said[1][case]
        else:
            assert said[0][case] == said[1][case] == "", (case, said)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_killed_with_shards_in_flight_leaves_a_whole_checkpoint(world_size: int, tmp_path: Path) -> None:
    draw, steps, leftovers = random.Random(world_size), [], 0
    folder = CheckpointFolder(tmp_path)
    for _ in range(6):
        with Ranks(world_size, ["-m", SUPPORT, str(tmp_path)]) as ranks:
            assert ranks.until(lambda: ranks.output(0).count("\n") >= 4), ranks.printed()
            time.sleep(draw.uniform(0, 0.3))
            ranks.kill([draw.randrange(world_size)])
            ranks.wait(60)
        leftovers += bool(list(tmp_path.glob(".*.tmp")))
        assert folder.latest is not None
        for name in folder.names():
            found = folder.load(name)["payload"]
            torch.testing.assert_close(found, state_of(found["step"], width=20_000), rtol=0, atol=0)
        steps.append(folder.load(folder.latest)["payload"]["step"])
    assert steps == sorted(set(steps)) and leftovers, (steps, leftovers)
