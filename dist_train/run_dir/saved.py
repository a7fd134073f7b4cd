"""Reads `checkpoints/` without torch: names, order and integrity of the checkpoints, and their JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_train.errors import CheckpointError, DamagedCheckpointError
from dist_train.untrusted import parse_json

FORMAT = 2
SHARDED_FORMAT = 3  # of a state with shards, which older versions cannot read
TENSORS, TREE, MANIFEST, LATEST = "tensors.safetensors", "state.json", "manifest.json", "latest.json"
COPY, ASIDE = "copy-of-", "damaged-"  # prefixes of folders that are no checkpoints in force

_NAME = re.compile(r"(?P<stage>.+)-(?:(?P<step>\d{8,})(?P<open>-open)?|end)")
# What reading gives where a disk lost or garbled something; any other error says nothing about the checkpoint.
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EUCLEAN, errno.EBADMSG)


@dataclass(frozen=True)
class Moment:
    """The moment of a run that a checkpoint holds.

    Attributes:
        step: number of optimizer steps of the stage; None for the stage's end.
        open: True if the epoch's steps are done, but its evaluation is not.
    """

    stage: str
    step: int | None
    open: bool = False

    def __str__(self) -> str:
        return f"{self.stage}-end" if self.step is None else f"{self.stage}-{self.step:08d}{'-open' * self.open}"

    @classmethod
    def named(cls, name: str) -> Moment | None:
        """Inverts `str`; None for any other name."""
        match = None if name.startswith((COPY, ASIDE, ".")) else _NAME.fullmatch(name)
        if match is None:
            return None
        return cls(match["stage"], None if match["step"] is None else int(match["step"]), match["open"] is not None)


def manifest_bytes(name: str, files: dict[str, str]) -> bytes:
    """Returns the manifest's bytes for file -> SHA-256.

    It has a hash of its own, so damage to it is not blamed on another file.
    """
    own = hashlib.sha256(json.dumps([name, files]).encode()).hexdigest()
    return json.dumps({"name": name, "sha256": files, "manifest_sha256": own}).encode()


def named_in(folder: Path) -> str | None:
    """Reads the name that a checkpoint was saved under; None without a whole manifest. A copy has another name."""
    try:
        data = (folder / MANIFEST).read_bytes()
        recorded = parse_json(data)
        name = str(recorded["name"])
        return name if data == manifest_bytes(name, recorded["sha256"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turns an OSError into an error about the checkpoint in `folder`.

    Raises:
        DamagedCheckpointError: the disk lost or garbled something.
        CheckpointError: the file system does not let us read.
    """
    try:
        yield
    except OSError as error:
        message = f"the checkpoint {folder} is incomplete: {error}"
        if error.errno in _LOST:
            raise DamagedCheckpointError(message) from error
        raise CheckpointError(message, "make it readable, then the same command resumes") from error


def changed(file: Path, more: str = "") -> DamagedCheckpointError:
    """Returns the error for a file that does not have the hash that it was written with."""
    return DamagedCheckpointError(f"the checkpoint is damaged: {file} does not have the recorded SHA-256{more}")


def read_files(folder: Path, name: str, files: tuple[str, ...] = (TENSORS, TREE)) -> dict[str, bytes]:
    """Returns the content of a checkpoint's files, with the manifest, after comparing their hashes.

    Raises:
        DamagedCheckpointError: one is missing, or is not what was written under `name`; names it.
        CheckpointError: the file system does not let us read.
    """
    contents: dict[str, bytes] = {}
    for file in (MANIFEST, *files):
        with reading(folder):
            contents[file] = (folder / file).read_bytes()
    try:
        recorded = parse_json(contents[MANIFEST])["sha256"]
        whole = contents[MANIFEST] == manifest_bytes(name, recorded)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DamagedCheckpointError(f"the checkpoint is damaged: {folder / MANIFEST} is not what was written")
    for file in files:
        if hashlib.sha256(contents[file]).hexdigest() != recorded.get(file):
            raise changed(folder / file)
    return contents


def shard_file(rank: int) -> str:
    """Returns the name of the file that holds a rank's shards."""
    return f"shards-rank{rank}.safetensors"


def shard_hashes(contents: dict[str, bytes], folder: Path) -> dict[str, str]:
    """Returns the recorded SHA-256 of each file of shards, in the ranks' order; empty where the state has none.

    Raises:
        CheckpointError: as `tree_in`; or the manifest lists others than the tree was written with.
    """
    recorded: dict[str, str] = parse_json(contents[MANIFEST])["sha256"]
    files = [file for file in recorded if file not in (TENSORS, TREE)]
    world_size = _document(contents, folder).get("world_size", 0)
    if set(files) != {shard_file(rank) for rank in range(len(files))} or world_size != len(files):
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: its manifest does not list the shards of {world_size} ranks",
            "use the version of dist_train that wrote it",
        )
    return {file: recorded[file] for file in map(shard_file, range(len(files)))}


def tree_in(contents: dict[str, bytes], folder: Path) -> Any:
    """Returns the JSON tree of a checkpoint's state.

    Raises:
        CheckpointError: another version of dist_train wrote it.
    """
    return _document(contents, folder)["state"]


def _document(contents: dict[str, bytes], folder: Path) -> Any:
    try:
        document = parse_json(contents[TREE])
    except ValueError as error:
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: {folder / TREE} is no JSON, or not ours: {error}",
            "start anew with another --run.dir",
        ) from error
    if document["format"] not in (FORMAT, SHARDED_FORMAT):
        raise CheckpointError(
            f"the checkpoint {folder} has format {document['format']}, this version reads {FORMAT} and "
            f"{SHARDED_FORMAT}",
            "use the version of dist_train that wrote it",
        )
    return document


def read_tree(path: Path, name: str) -> Any:
    """Returns the JSON tree of the checkpoint `name`, or of its copy where it is damaged; reads no tensors.

    Raises:
        CheckpointError: as `read_files` and `tree_in`.
    """
    folder = path / name
    try:
        return tree_in(read_files(folder, name, (TREE,)), folder)
    except DamagedCheckpointError:
        copy = path / f"{COPY}{name}"
        if not copy.is_dir():
            raise
        return tree_in(read_files(copy, name, (TREE,)), copy)


def pointed(path: Path) -> tuple[str | None, str]:
    """Returns the name in latest.json, and "".

    Returns None where it names no place for a checkpoint in this folder, and what is wrong with it; "" without the
    file.
    """
    try:
        text = (path / LATEST).read_text(encoding="utf-8")
        name = parse_json(text)["name"]
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"{path / LATEST} is damaged: {error!r}"
    if not isinstance(name, str) or Path(name).name != name or name.startswith((".", COPY, ASIDE)) or "\0" in name:
        return None, f"{path / LATEST} names {str(name)!r}, which is no checkpoint of this folder"
    return name, ""


def newest_first(path: Path) -> list[str]:
    """Lists the checkpoints from the newest to the oldest: first the one that latest.json names, whole or not.

    The order comes from what they hold (finished stages, steps), not from times of files. Those that cannot tell come
    before the others.

    Raises:
        CheckpointError: latest.json is there, but neither it nor the folder names a checkpoint.
    """
    first, problem = pointed(path)
    names = {} if first is None else {first: None}
    names |= dict.fromkeys(sorted(_listed(path), key=lambda name: (_age(path, name), name), reverse=True))
    if problem and not names:
        raise CheckpointError(f"{problem}, and no checkpoint is beside it", NO_CHECKPOINT)
    return list(names)


NO_CHECKPOINT = "restore one from a backup, then the same command resumes; or begin anew with --run.dir DIR"


def newest(path: Path) -> str | None:
    """Name of the newest checkpoint, damaged or not; None in a new run.

    Raises:
        CheckpointError: as `newest_first`.
    """
    found = pointed(path)[0]  # without reading all of them
    return found or next(iter(newest_first(path)), None)


def _listed(path: Path) -> set[str]:
    """Names the folders of checkpoints, and what only a copy is left of. Leaves out folders that others put there."""
    if not path.is_dir():
        return set()
    folders = [entry.name for entry in path.iterdir() if entry.is_dir()]
    listed = set()
    for name in folders:
        original = name.removeprefix(COPY)
        known = named_in(path / name)
        torn = known is None and Moment.named(original) is not None and _holds_some(path / name)
        if not name.startswith((".", ASIDE)) and (known == original or torn):
            listed.add(original)
    return listed


def _holds_some(folder: Path) -> bool:
    return any((folder / file).exists() for file in (MANIFEST, TENSORS, TREE, shard_file(0)))


def _age(path: Path, name: str) -> tuple[float, ...]:
    try:
        tree = read_tree(path, name)
    except CheckpointError:
        return (float("inf"),)
    if not isinstance(tree, dict):
        return (0,)
    payload = tree.get("payload")
    within = payload if isinstance(payload, dict) and not tree.get("finished") else {}
    return len(tree.get("finished_stages", ())), within.get("step", 0), not within.get("epoch_open", False)
