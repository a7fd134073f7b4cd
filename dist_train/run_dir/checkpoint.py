"""Saves and loads checkpoints, whole or not at all: written beside, hashed, fsynced, renamed; `latest` moves last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from dist_train.errors import CheckpointError, RunDirError
from dist_train.run_dir import state_codec as codec
from dist_train.run_dir.files import read_json, replace_json, sync_directory, write_folder

_FORMAT = 2
_TENSORS, _TREE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class CheckpointFolder:
    """The folder `checkpoints/` of a run. Only rank 0 writes to it.

    A checkpoint is a folder of three files: tensors, the rest as JSON, and a manifest with the SHA-256 of both.
    `latest.json` names the newest whole one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def latest(self) -> str | None:
        """Name of the newest whole checkpoint; None in a new run.

        Raises:
            CheckpointError: latest.json is damaged.
        """
        file = self._path / "latest.json"
        try:
            value = read_json(file)
            return None if value is None else str(value["name"])
        except (RunDirError, KeyError, TypeError) as error:
            hint = f'write {{"name": "NAME"}} into it, where NAME is the newest folder in {self._path}'
            raise CheckpointError(f"{file} is damaged: {error!r}", hint) from error

    def save(self, name: str, state: Any) -> None:
        """Writes a checkpoint and points `latest` to it. A kill at any moment leaves the former one in force."""
        self._path.mkdir(parents=True, exist_ok=True)
        target, temporary = self._path / name, self._path / f".{name}.tmp"
        # The checkpoint in force must live until the new one is whole, so the new one cannot have its name.
        assert name != self.latest, f"the checkpoint {name} is the latest one already"
        tree, tensors = codec.encode(state)
        # The codec gives flat tensors that do not overlap, so safetensors meets no strides and no shared memory.
        contents = {
            _TENSORS: safetensors.torch.save(tensors),
            _TREE: json.dumps({"format": _FORMAT, "state": tree}, allow_nan=False).encode(),
        }
        hashes = {file: hashlib.sha256(data).hexdigest() for file, data in contents.items()}
        try:
            for stale in self._path.glob(".*.tmp"):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            write_folder(temporary, {**contents, _MANIFEST: _manifest(name, hashes)})
            if target.exists():
                # An attempt was killed before `latest` moved here: nothing refers to it.
                self._remove(name)
            os.rename(temporary, target)
            sync_directory(self._path)
            replace_json(self._path / "latest.json", {"name": name})
        except OSError as error:
            raise CheckpointError(
                f"cannot write the checkpoint {target}: {error}",
                "make room or mend the file system, then the same command resumes",
            ) from error

    def load(self, name: str) -> Any:
        """Returns the state of a checkpoint, on the CPU.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        folder = self._path / name
        hint = f"restore {folder} from a backup, or start anew with another --run.dir"
        try:
            manifest = (folder / _MANIFEST).read_bytes()
            contents = {file: (folder / file).read_bytes() for file in (_TENSORS, _TREE)}
        except OSError as error:
            raise CheckpointError(f"the checkpoint {folder} is incomplete: {error}", hint) from error
        try:
            recorded = json.loads(manifest)["sha256"]
            whole = manifest == _manifest(name, recorded)
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise CheckpointError(f"the checkpoint is damaged: {folder / _MANIFEST} is not what was written", hint)
        for file, data in contents.items():
            if hashlib.sha256(data).hexdigest() != recorded.get(file):
                raise CheckpointError(
                    f"the checkpoint is damaged: {folder / file} does not have the recorded SHA-256", hint
                )
        document = json.loads(contents[_TREE])
        if document["format"] != _FORMAT:
            raise CheckpointError(
                f"the checkpoint {folder} has format {document['format']}, this version reads {_FORMAT}",
                "use the version of dist_train that wrote it",
            )
        try:
            tensors = safetensors.torch.load(contents[_TENSORS])
        except SafetensorError as error:
            raise CheckpointError(f"the checkpoint {folder} cannot be read: {error}", hint) from error
        return codec.decode(document["state"], tensors)

    def names(self) -> list[str]:
        """Lists the whole checkpoints, sorted, without folders that somebody else put here."""
        return sorted(
            folder.name
            for folder in self._path.iterdir()
            if not folder.name.startswith(".") and _named(folder / _MANIFEST) == folder.name
        )

    def keep_only(self, names: set[str]) -> None:
        """Removes the checkpoints that are not in `names`."""
        for name in set(self.names()) - names:
            self._remove(name)

    def _remove(self, name: str) -> None:
        # Renamed first, so that a kill in between leaves no half checkpoint under a valid name.
        doomed = self._path / f".{name}.old.tmp"
        os.rename(self._path / name, doomed)
        shutil.rmtree(doomed)


def _manifest(name: str, files: dict[str, str]) -> bytes:
    """Returns the manifest's bytes for file -> SHA-256.

    It has a hash of its own, so damage to it is not blamed on another file.
    """
    own = hashlib.sha256(json.dumps([name, files]).encode()).hexdigest()
    return json.dumps({"name": name, "sha256": files, "manifest_sha256": own}).encode()


def _named(manifest: Path) -> str | None:
    """Reads the name that a checkpoint was saved under; None without a manifest. A copy has another name."""
    try:
        return str(json.loads(manifest.read_bytes())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
