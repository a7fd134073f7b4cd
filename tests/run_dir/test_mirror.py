"""A run directory at an object store, before a real S3 server: pushed and pulled whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dist_train.errors import RunDirError, StoreError
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.mirror import MARK, Mirror
from tests.support.s3_server import S3, _s3_of_module, ask, s3

__all__ = ["_s3_of_module", "s3"]
pytestmark = pytest.mark.heavy


def _quiet(text: str) -> None:
    pass


def _run(folder: Path, *names: str) -> Path:
    """Makes a run directory with checkpoints, whose tensor holds the last name's number of its letter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").write_text('{"state": "running"}')
    (folder / "metrics.jsonl").write_text("".join(f'{{"checkpoint": "{name}"}}\n' for name in names))
    for name in names:
        if not (folder / "checkpoints" / name).exists():
            state = {"w": torch.full((1000,), float(ord(name))), "finished_stages": {}}
            CheckpointFolder(folder / "checkpoints").save(name, state)
    CheckpointFolder(folder / "checkpoints").keep_only({names[-1]})
    return folder


def _tree(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != MARK)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_what_was_pushed_is_pulled_on_another_machine(s3: S3, tmp_path: Path) -> None:
    first = _run(tmp_path / "first", "a")
    (first / ".hidden").write_text("of this machine")
    (first / "logs").mkdir()
    (first / "logs" / "link").symlink_to("/etc/passwd")
    Mirror(s3.store("whole"), first, _quiet).pull()  # nothing is there: the folder is kept aside
    assert not (first / "status.json").exists()
    _run(first, "a")
    Mirror(s3.store("whole"), first, _quiet).push()
    second = tmp_path / "second"
    Mirror(s3.store("whole"), second, _quiet).pull()
    expected = _tree(first)
    del expected[".hidden"], expected["logs/link"]
    assert _tree(second) == expected


def test_a_push_sends_what_changed_only_and_removes_what_is_gone(s3: S3, tmp_path: Path) -> None:
    local = tmp_path / "local"
    mirror = Mirror(s3.store("again"), local, _quiet)
    mirror.pull()
    _run(local, "a")
    mirror.push()
    s3.way.let()
    mirror.push()
    assert s3.way.requests == 0
    (local / "metrics.jsonl").write_text("{}\n")
    mirror.push()
    assert s3.way.requests == 2  # the file and the mark
    _run(local, "a", "b")
    mirror.push()
    assert not any(name.startswith("checkpoints/a/") for name in s3.store("again").sizes())


def _cut_and_pull(s3: S3, tmp_path: Path, requests: int) -> bool:
    """Cuts the second push after as many requests; checks what another machine finds. Returns whether it was cut."""
    name = f"cut-{requests}"
    local = tmp_path / name
    mirror = Mirror(s3.store(name), local, _quiet)
    mirror.pull()
    _run(local, "a")
    mirror.push()
    _run(local, "a", "b")
    s3.way.let(requests)
    try:
        mirror.push()
        cut = False
    except StoreError:
        cut = True
    s3.way.let()
    other = tmp_path / f"{name}-other"
    Mirror(s3.store(name), other, _quiet).pull()
    newest, state = CheckpointFolder(other / "checkpoints").load_newest()
    assert newest in ("a", "b")
    assert torch.equal(state["w"], torch.full((1000,), float(ord(newest))))
    if cut:
        mirror.push()
        again = tmp_path / f"{name}-again"
        Mirror(s3.store(name), again, _quiet).pull()
        assert _tree(again) == _tree(local)
    else:
        assert newest == "b"
    return cut


def test_a_push_that_is_cut_leaves_a_whole_checkpoint_in_force(s3: S3, tmp_path: Path) -> None:
    assert _cut_and_pull(s3, tmp_path, 3)


@pytest.mark.slow
def test_a_push_may_be_cut_at_any_request(s3: S3, tmp_path: Path) -> None:
    cut = [_cut_and_pull(s3, tmp_path, requests) for requests in range(14)]
    assert cut[0] and not cut[-1]
    assert cut == sorted(cut, reverse=True)


@pytest.mark.slow
def test_a_push_that_died_with_its_process_is_ended_by_the_next_one(s3: S3, tmp_path: Path) -> None:
    local = tmp_path / "local"
    mirror = Mirror(s3.store("died"), local, _quiet)
    mirror.pull()
    _run(local, "a")
    s3.way.let(4)
    with pytest.raises(StoreError):
        mirror.push()
    s3.way.let()
    after = Mirror(s3.store("died"), local, _quiet)  # as a new process
    after.pull()
    assert (local / "checkpoints" / "a").is_dir()
    after.push()
    other = tmp_path / "other"
    Mirror(s3.store("died"), other, _quiet).pull()
    assert _tree(other) == _tree(local)


def _gone_on_elsewhere(s3: S3, tmp_path: Path, name: str) -> tuple[Path, Path]:
    """Pushes checkpoint a from one machine, then b from another; returns their working copies."""
    folders = (tmp_path / "here", tmp_path / "there")
    for folder, checkpoints in zip(folders, (["a"], ["a", "b"]), strict=True):
        mirror = Mirror(s3.store(name), folder, _quiet)
        mirror.pull()
        _run(folder, *checkpoints)
        mirror.push()
    return folders


def test_a_working_copy_that_another_machine_left_behind_is_taken_anew(s3: S3, tmp_path: Path) -> None:
    here, there = _gone_on_elsewhere(s3, tmp_path, "moved")
    said: list[str] = []
    Mirror(s3.store("moved"), here, said.append).pull()
    assert _tree(here) == _tree(there)
    assert said == []


def test_what_was_never_pushed_is_kept_when_another_machine_went_on(s3: S3, tmp_path: Path) -> None:
    here, _ = _gone_on_elsewhere(s3, tmp_path, "forked")
    _run(here, "a", "c")
    (here / "logs").mkdir()
    (here / "logs" / "agent.log").write_text("an agent writes here")
    said: list[str] = []
    Mirror(s3.store("forked"), here, said.append).pull()
    assert (here / "checkpoints" / "b").is_dir()
    assert (here / "logs" / "agent.log").exists()
    aside = tmp_path / "here-aside-1"
    assert (aside / "checkpoints" / "c").is_dir()
    assert str(aside) in said[0]


def test_a_run_that_was_removed_at_the_store_does_not_come_back(s3: S3, tmp_path: Path) -> None:
    local = tmp_path / "local"
    store = s3.store("removed")
    mirror = Mirror(store, local, _quiet)
    mirror.pull()
    _run(local, "a")
    mirror.push()
    store.remove(store.sizes())
    Mirror(store, local, _quiet).pull()
    assert _tree(local) == {}


def test_a_folder_of_something_else_is_refused(s3: S3, tmp_path: Path) -> None:
    s3.store("foreign").write("photos/cat.jpg", b"cat")
    with pytest.raises(RunDirError, match="is not empty, and is not a run directory"):
        Mirror(s3.store("foreign"), tmp_path / "local", _quiet).pull()
    assert s3.store("foreign").read("photos/cat.jpg") == b"cat"


def test_names_of_objects_do_not_lead_out_of_the_folder(s3: S3, tmp_path: Path) -> None:
    local = tmp_path / "deep" / "local"
    Mirror(s3.store("crafted"), local, _quiet).pull()
    _run(local, "a")
    Mirror(s3.store("crafted"), local, _quiet).push()
    for key in ("crafted/%2E%2E/%2E%2E/evil", "crafted//etc/evil", "crafted/a%5C..%5Cevil", "crafted/logs/%2E%2E/evil"):
        ask(f"{os.environ['AWS_ENDPOINT_URL']}/bucket/{key}", "PUT", b"evil")
    other = tmp_path / "deep" / "other"
    Mirror(s3.store("crafted"), other, _quiet).pull()
    assert _tree(other) == _tree(local)
    assert not list(tmp_path.rglob("*evil*"))


def test_a_bucket_that_is_not_there_is_named(s3: S3, tmp_path: Path) -> None:
    from dist_train.run_dir.store import Store

    local = _run(tmp_path / "local", "a")
    with pytest.raises(StoreError, match="bucket"):
        Mirror(Store("s3://no-such-bucket/x"), local, _quiet).push()
