"""The artifact's directory: files and a manifest with their hashes, written whole or not at all, checked when read.

Hashes detect damage, not malice: whoever can change a model can change the hashes. Loading a manipulated program can
run code (`programs.pt2` refuses the forms that it recognizes). Load artifacts only from a source you trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dist_train.artifact.manifest import MOST_VALUES, mistake_in
from dist_train.errors import ArtifactError
from dist_train.run_dir.files import sync_directory, write_folder
from dist_train.untrusted import MOST_JSON_BYTES, BeyondLimits, parse_json, read_at_most, read_json_file, read_whole

FORMAT = "dist_train/2"
MANIFEST = "manifest.json"
_REQUIRED = (
    "models",
    "default",
    "task",
    "normalization",
    "classes",
    "ranges_sha256",
    "world_sizes",
    "metrics",
)
EXPORT_AGAIN = "copy it again from where it was exported, or write it anew: dist-train export RUN_DIR"


def _versions() -> dict[str, str]:
    try:
        return {"torch": torch.__version__, "torchao": version("torchao")}
    except PackageNotFoundError:  # only pt2e needs torchao
        return {"torch": torch.__version__}


def _aside(directory: Path) -> Path:
    """Place of the older artifact between the two renames of a replacement."""
    return directory.with_name(f".{directory.name}.old")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """Canonical text: any other text is damaged. `sha256` covers all other fields."""
    fields = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(fields, sort_keys=True, allow_nan=False)
    fields["sha256"] = _digest(text.encode())
    return (json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _refuse_to_replace_foreign_files(directory: Path) -> None:
    """Raises ArtifactError for a file that the manifest does not list; the manifest may be damaged."""
    try:
        listed = set(read_json_file(directory / MANIFEST)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        listed = {"model.pt2", "model.ts"}
    foreign = sorted(entry.name for entry in directory.iterdir() if entry.name not in listed | {MANIFEST})
    if foreign:
        raise ArtifactError(
            f"{directory} holds {foreign[0]!r}, which no export wrote: it would be deleted with the older artifact",
            "move it away, or export to another directory",
        )


def write_artifact(directory: Path, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    """Writes the artifact into `directory`, whole or not at all; an older one stays whole until it is replaced.

    Only one process writes at a time (rank 0).

    Args:
        files: every file of the artifact but the manifest, by name.
        manifest: the fields below, and any other JSON:

            - `models`: {name: {"file", "kind" ("pt2" or "torchscript"), "extra" [names], "formats" {...}}}
            - `default`: one of the names
            - `task`, `classes`, `world_sizes`, `metrics`
            - `inputs`: a list of {"name", "shape": [null, ...] with null for what varies, "dtype"}; the name is ""
              for a model of one tensor, else keys and positions joined by dots; `outputs`: names of the outputs
            - `dynamic`: names of what varies besides the batch, as {"input_ids": {"1": "sequence"}}
            - `input`: of a model of one tensor, {"shape": [null, C, H, W], "dtype", "resize"}
            - `normalization`: {"mean", "std"} (or null); with uint8 input it is inside the programs
            - `ranges_sha256`: null for a float model

            Added here: `format`, `versions` (torch, torchao), `files` {name: {"sha256", "bytes"}} and the manifest's
            own `sha256`.

    Raises:
        ArtifactError: the file system refuses, or `directory` holds files that are not an artifact's.
    """
    missing = [key for key in _REQUIRED if key not in manifest]
    assert not missing, f"the manifest lacks {missing}"
    assert "input" in manifest or "inputs" in manifest
    assert manifest["default"] in manifest["models"]
    assert all(entry["file"] in files for entry in manifest["models"].values())
    content = {
        **manifest,
        "format": FORMAT,
        "versions": {**_versions(), **manifest.get("versions", {})},
        "files": {name: {"sha256": _digest(data), "bytes": len(data)} for name, data in files.items()},
    }
    contents = {**files, MANIFEST: _manifest_bytes(content)}
    directory = Path(directory).resolve()
    temporary = directory.with_name(f".{directory.name}.new")
    aside = _aside(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists():
            _refuse_to_replace_foreign_files(directory)
        elif aside.exists():  # a replacement was killed between its two renames
            os.rename(aside, directory)
        for leftover in (temporary, aside):
            if leftover.exists():
                shutil.rmtree(leftover)
        write_folder(temporary, contents)
        if directory.exists():
            os.rename(directory, aside)
        os.rename(temporary, directory)
        sync_directory(directory.parent)
        if aside.exists():
            shutil.rmtree(aside)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ArtifactError(
            f"the artifact could not be written to {directory}: {error}",
            "make room or rights there and run the same command again; an older artifact is still whole",
        ) from error


def _read_file(directory: Path, name: str, size: int | None = None) -> bytes:
    """Returns the bytes of a file that must have `size` of them; None: as many as JSON may have."""
    path = directory / name
    try:
        return read_at_most(path, MOST_JSON_BYTES) if size is None else read_whole(path, size)
    except BeyondLimits as error:
        raise ArtifactError(f"{path} is damaged: {error}", EXPORT_AGAIN) from error
    except FileNotFoundError:
        raise ArtifactError(f"{directory / name} is missing", EXPORT_AGAIN) from None
    except OSError as error:
        raise ArtifactError(f"{directory / name} cannot be read: {error}", EXPORT_AGAIN) from error


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    data = _read_file(directory, MANIFEST)
    try:
        manifest = parse_json(data, MOST_VALUES)
        found = manifest["format"]
        whole = _manifest_bytes(manifest) == data
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # no JSON, no UTF-8, no object, NaN
        raise ArtifactError(f"{path} is damaged: {error}", EXPORT_AGAIN) from error
    if found != FORMAT:
        raise ArtifactError(
            f"{path}: format {found!r} is not {FORMAT!r}, which this version reads",
            "pip install the dist-train that wrote it, or " + EXPORT_AGAIN,
        )
    if not whole:
        raise ArtifactError(f"{path} is damaged or was edited: it does not match its own sha256", EXPORT_AGAIN)
    mistake = mistake_in(manifest)
    if mistake:
        raise ArtifactError(f"{path} is not what an export writes: {mistake}", EXPORT_AGAIN)
    return dict(manifest)


def find_artifact(path: Path) -> Path:
    """Finds an artifact's directory: `path` is it, is a run's directory with an export, or is a file in it.

    Raises:
        ArtifactError: there is none.
    """
    path = path.resolve()
    folder = path if path.is_dir() or not path.suffix else path.parent
    for candidate in (folder, folder / "export"):
        for each in (candidate, _aside(candidate)):  # the older one, where a replacement was killed between its renames
            if (each / MANIFEST).is_file() or (candidate == folder and (each / "model.pt2").is_file()):
                return each
    raise ArtifactError(
        f"there is no artifact at {path}",
        "name an export directory, as in runs/NAME/export; to write one: dist-train export runs/NAME",
    )


def read_artifact(directory: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns the manifest and the bytes that were hashed, so that nothing can change between the check and the use."""
    manifest = _read_manifest(directory)
    files: dict[str, bytes] = {}
    for name, expected in manifest["files"].items():
        data = files[name] = _read_file(directory, name, expected["bytes"])
        if _digest(data) != expected["sha256"]:
            raise ArtifactError(
                f"{directory / name} is damaged: its sha256 is {_digest(data)[:12]}..., "
                f"but {MANIFEST} says {expected['sha256'][:12]}...",
                "copy it again from where it came, or " + EXPORT_AGAIN,
            )
    return manifest, files


def verify_artifact(directory: Path | str) -> dict[str, Any]:
    """Hashes every listed file and returns the manifest. Nothing but the manifest's JSON is deserialized.

    Raises:
        ArtifactError: a file is missing or a byte differs, in the manifest too; names the file.
    """
    return read_artifact(find_artifact(Path(directory)))[0]
