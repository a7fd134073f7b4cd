"""A checkpoint is whole or absent: damage is named, kills in the middle of saving leave the former one in force."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.errors import CheckpointError
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.snapshot import take
from tests.support.ranks import ROOT

STATE: dict[str, Any] = {
    "model": {"weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(7)},
    "schedule": {"milestones": {3: 1}, "rates": (0.1, float("inf"))},
}
FILES = ("tensors.safetensors", "state.json", "manifest.json")
KILLS = 6


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints")


def test_what_was_saved_is_loaded(folder: CheckpointFolder) -> None:
    assert folder.latest is None
    folder.save("train-00000001", STATE)
    back = folder.load("train-00000001")
    assert folder.latest == "train-00000001"
    assert torch.equal(back["model"]["weight"], STATE["model"]["weight"]) and back["schedule"] == STATE["schedule"]


def test_the_former_checkpoint_lives_until_it_is_removed(folder: CheckpointFolder, tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        folder.save(name, {"name": name})
    assert folder.names() == ["a", "b", "c", "d"] and folder.latest == "d"
    folder.keep_only({"b", "d", "never-saved"})
    assert folder.names() == ["b", "d"] and folder.load("b") == {"name": "b"}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["b", "d", "latest.json"]


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_byte_is_an_error_that_names_the_file(file: str, folder: CheckpointFolder, tmp_path: Path) -> None:
    folder.save("a", STATE)
    path = tmp_path / "checkpoints" / "a" / file
    data = path.read_bytes()
    for position in range(len(data)):
        for flip in (0x01, 0x80):
            path.write_bytes(data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :])
            with pytest.raises(CheckpointError, match=f"a/{file}"):
                folder.load("a")
    path.write_bytes(data)
    folder.load("a")


@pytest.mark.parametrize("file", FILES)
def test_a_missing_or_shortened_file_is_an_error_that_names_it(
    file: str, folder: CheckpointFolder, tmp_path: Path
) -> None:
    folder.save("a", STATE)
    path = tmp_path / "checkpoints" / "a" / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"a/{file}"):
        folder.load("a")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"a/{file}"):
        folder.load("a")


def at(stage: str, step: int | None, *finished: str, needs: Sequence[str] = (), open_: bool = False) -> dict[str, Any]:
    """The part of a checkpoint that tells its place among the others."""
    ends = {each: f"{each}-end" for each in (*finished, *([stage] if step is None else []))}
    payload = {} if step is None else {"step": step, "epoch_open": open_}
    return {"stage": stage, "finished": step is None, "payload": payload, "finished_stages": ends, "needs": list(needs)}


def saved_in_order(folder: CheckpointFolder) -> None:
    """Saves checkpoints of two stages, whose order is not that of their names."""
    for name, state in {
        "warm-00000008": at("warm", 8),
        "warm-end": at("warm", None),
        "fine-00000009": at("fine", 9, "warm", needs=["warm-end"]),
        "fine-00000011-open": at("fine", 11, "warm", needs=["warm-end"], open_=True),
        "fine-00000011": at("fine", 11, "warm", needs=["warm-end"]),
        "fine-100000000": at("fine", 10**8, "warm", needs=["warm-end"]),
        "fine-end": at("fine", None, "warm", needs=["warm-end"]),
    }.items():
        folder.save(name, state, twice=name.endswith("-end"))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"nam": "a"}', '{"name": 3}', '{"name": "../../x"}', '{"name": "/etc"}', '{"name": ".."}'),
        *('{"name": "copy-of-fine-end"}', '{"name": "damaged-fine-end"}', '{"name": "a\\u0000b"}', None),
    ],
)
def test_a_latest_that_is_lost_or_names_another_place_is_found_from_the_folder(
    text: str | None, folder: CheckpointFolder, tmp_path: Path
) -> None:
    order = ["fine-end", "fine-100000000", "fine-00000011", "fine-00000011-open", "fine-00000009"]
    saved_in_order(folder)
    latest = tmp_path / "checkpoints" / "latest.json"
    latest.unlink() if text is None else latest.write_text(text)
    (tmp_path / "x").mkdir()
    assert folder.newest_first() == [*order, "warm-end", "warm-00000008"] and folder.latest == "fine-end"


def test_one_that_latest_names_comes_first_although_it_is_gone(folder: CheckpointFolder, tmp_path: Path) -> None:
    saved_in_order(folder)
    shutil.rmtree(tmp_path / "checkpoints" / "fine-end")
    shutil.rmtree(tmp_path / "checkpoints" / "copy-of-fine-end")
    assert folder.latest == "fine-end" and folder.newest_first()[:2] == ["fine-end", "fine-100000000"]


def test_a_latest_beside_which_nothing_is_left_is_no_new_run(folder: CheckpointFolder, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert folder.latest is None and folder.newest_first() == []
    (tmp_path / "checkpoints" / "latest.json").write_text("")
    with pytest.raises(CheckpointError, match="no checkpoint is beside it"):
        _ = folder.latest


def test_copies_and_folders_of_others_are_no_checkpoints(folder: CheckpointFolder, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints"
    folder.save("train-00000001", at("train", 1))
    shutil.copytree(path / "train-00000001", path / "train-00000002")
    shutil.copytree(path / "train-00000001", path / "my backup")
    (path / "notes-end").mkdir()
    (path / "latest.json").unlink()
    assert folder.newest_first() == ["train-00000001"]


def test_what_one_saved_twice_lost_is_read_from_its_copy(folder: CheckpointFolder, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints"
    folder.save("a", STATE, twice=True)
    assert folder.names() == ["a"]
    assert all((path / "a" / file).read_bytes() == (path / "copy-of-a" / file).read_bytes() for file in FILES)
    (path / "a" / FILES[0]).write_bytes(b"")
    assert torch.equal(folder.load("a")["model"]["weight"], STATE["model"]["weight"])
    usable, damage = folder.inspect("a")
    assert usable and list(damage) == ["a"] and f"a/{FILES[0]}" in damage["a"]
    assert folder.set_aside("a") == "damaged-a" and folder.inspect("a") == (True, {})
    (path / "copy-of-a" / FILES[1]).unlink()
    (path / "a" / FILES[2]).unlink()
    assert folder.inspect("a")[0] is False
    assert folder.set_aside("a") == "damaged-a-2", "the first one is kept"
    assert sorted(each.name for each in path.iterdir()) == [
        "damaged-a",
        "damaged-a-2",
        "damaged-copy-of-a-2",
        "latest.json",
    ]


def test_a_copy_goes_with_its_checkpoint(folder: CheckpointFolder, tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder.save(name, {}, twice=True)
    folder.keep_only({"b"})
    assert sorted(each.name for each in (tmp_path / "checkpoints").iterdir()) == ["b", "copy-of-b", "latest.json"]
    folder.keep_only({"b"}, copies=False)
    assert sorted(each.name for each in (tmp_path / "checkpoints").iterdir()) == ["b", "latest.json"]


def test_one_is_of_use_only_with_those_that_it_needs(folder: CheckpointFolder, tmp_path: Path) -> None:
    saved_in_order(folder)
    assert folder.inspect("fine-00000009") == (True, {})
    for name in ("warm-end", "copy-of-warm-end"):
        (tmp_path / "checkpoints" / name / FILES[1]).write_bytes(b"{}")
    usable, damage = folder.inspect("fine-00000009")
    assert not usable and list(damage) == ["warm-end"]
    assert folder.inspect("warm-00000008") == (True, {})


def test_a_folder_that_a_kill_left_before_latest_moved_is_replaced(folder: CheckpointFolder, tmp_path: Path) -> None:
    folder.save("a", {"value": 1})
    folder.save("b", {"value": 2})
    (tmp_path / "checkpoints" / "latest.json").write_text('{"name": "a"}')
    folder.save("b", {"value": 3})
    assert folder.latest == "b" and folder.load("b") == {"value": 3}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["a", "b", "latest.json"]


def test_the_checkpoint_in_force_is_not_overwritten(folder: CheckpointFolder) -> None:
    folder.save("a", {"value": 1})
    with pytest.raises(AssertionError, match="the latest one already"):
        folder.save("a", {"value": 2})
    assert folder.load("a") == {"value": 1}


def test_what_cannot_be_saved_changes_nothing(folder: CheckpointFolder, tmp_path: Path) -> None:
    class Reduced:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    folder.save("a", {"value": 1})
    with pytest.raises(CheckpointError, match=r"state\.plan is a .*Reduced"):
        folder.save("b", {"plan": Reduced()})
    assert folder.names() == ["a"] and folder.latest == "a" and not (tmp_path / "unpickled").exists()


def test_a_pickle_in_the_place_of_the_tensors_is_not_read(folder: CheckpointFolder, tmp_path: Path) -> None:
    # Hashed as ours would be, so that only the reader stands between it and its code.
    from dist_train.run_dir.saved import manifest_bytes

    class Reduced:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    import hashlib

    folder.save("a", STATE)
    inside = tmp_path / "checkpoints" / "a"
    torch.save({"weight": Reduced()}, inside / FILES[0])
    (inside / FILES[2]).write_bytes(
        manifest_bytes("a", {file: hashlib.sha256((inside / file).read_bytes()).hexdigest() for file in FILES[:2]})
    )
    with pytest.raises(CheckpointError, match="cannot be read"):
        folder.load("a")
    assert not (tmp_path / "unpickled").exists()


def test_a_full_disk_is_an_error_for_people(folder: CheckpointFolder, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "a").write_text("in the way")  # stands in for every OSError of the file system
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*/a: ") as caught:
        folder.save("a", STATE)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.hint


def test_a_try_that_failed_leaves_nothing_in_the_room_of_the_next(folder: CheckpointFolder, tmp_path: Path) -> None:
    folder.save("a", STATE)

    def stopped() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        folder.write("b", take(STATE), beat=stopped)
    assert sorted(each.name for each in (tmp_path / "checkpoints").iterdir()) == ["a", "latest.json"]
    folder.save("b", STATE)
    assert folder.latest == "b"


SAVER = """
import sys
from pathlib import Path
import torch
from dist_train.run_dir.checkpoint import CheckpointFolder

torch.set_num_threads(1)
folder = CheckpointFolder(Path(sys.argv[1]))
first = 0 if folder.latest is None else int(folder.load(folder.latest)["step"]) + 1
print("saving", flush=True)
for step in range(first, 10**6):
    tensors = {f"layer {number}": torch.full((300_000,), float(step)) for number in range(10)}
    folder.save(f"train-{step:08d}", {"step": step, "tensors": tensors, "numbers": [step] * 10_000})
    folder.keep_only({f"train-{step:08d}", f"train-{step - 1:08d}"})
    print(step, flush=True)
"""


@pytest.mark.heavy
@pytest.mark.timeout(400)
def test_kills_in_the_middle_of_saving_leave_latest_whole(tmp_path: Path) -> None:
    draw = random.Random(0)
    path = tmp_path / "checkpoints"
    folder = CheckpointFolder(path)
    steps, leftovers = [], 0
    for _ in range(KILLS):
        command = [sys.executable, "-c", SAVER, str(path)]
        with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"saving\n"
            # At any speed of the machine: so many whole saves, and a part of one.
            for _ in range(draw.randrange(1, 4)):
                began = time.monotonic()
                assert process.stdout.readline()
            time.sleep(draw.uniform(0.1, 0.9) * (time.monotonic() - began))
            assert process.poll() is None
            process.kill()
        leftovers += any(entry.name.startswith(".") for entry in path.iterdir()) if path.exists() else 0
        if folder.latest is None:
            continue
        state = folder.load(folder.latest)
        assert folder.latest == f"train-{state['step']:08d}"
        assert (
            all(bool((tensor == state["step"]).all()) for tensor in state["tensors"].values())
            and state["numbers"] == [state["step"]] * 10_000
        )
        for name in folder.names():
            folder.load(name)
        steps.append(state["step"])
    # Else the kills hit nothing, and the test shows nothing.
    assert steps == sorted(steps) and steps[-1] > steps[0] and leftovers >= 1, (steps, leftovers)
    folder.save("after", {"value": 1})
    assert not [entry for entry in path.iterdir() if entry.name.startswith(".")]


class _Killed(BaseException):
    """Stands for a SIGKILL: nothing in the program may catch it."""


def test_a_kill_between_any_two_operations_leaves_latest_whole(
    folder: CheckpointFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random kills seldom hit the moments between the last renames: here each file operation in turn is the last.
    left = [0]

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            if left[0] == 0:
                raise _Killed
            left[0] -= 1
            return operation(*arguments, **options)

        return run

    latest = tmp_path / "checkpoints" / "latest.json"
    folder.save("0", {"value": 0})
    moments = 0
    for operations in range(100):
        # An earlier kill left `next` behind, to which `latest` had not moved.
        folder.save("next", {"value": "orphan"})
        latest.write_text('{"name": "0"}')
        with monkeypatch.context() as patched:
            for name in ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink"):
                patched.setattr(os, name, counted(getattr(os, name)))
            left[0] = operations
            try:
                folder.save("next", {"value": 1}, twice=True)
                folder.keep_only({"next"})
                break
            except _Killed:
                moments += 1
        assert folder.latest is not None
        values = {name: folder.load(name)["value"] for name in folder.names()}
        assert values[folder.latest] == (0 if folder.latest == "0" else 1)
        if folder.latest == "next":
            folder.save("0", {"value": 0})
    else:
        pytest.fail("saving never ended")
    assert moments >= 15 and folder.names() == ["next"] and folder.load("next") == {"value": 1}


def test_the_folder_can_be_moved(folder: CheckpointFolder, tmp_path: Path) -> None:
    folder.save("a", STATE)
    shutil.move(tmp_path / "checkpoints", tmp_path / "elsewhere")
    moved = CheckpointFolder(tmp_path / "elsewhere")
    assert moved.latest == "a" and json.dumps(moved.load("a")["schedule"]["rates"]) == "[0.1, Infinity]"
