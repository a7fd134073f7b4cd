"""Fetches an artifact from an object store to this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from dist_train.addresses import local_copy
from dist_train.artifact.store import MANIFEST
from dist_train.errors import ArtifactError
from dist_train.run_dir.leftovers import beside, remove_leftovers
from dist_train.run_dir.store import Store
from dist_train.run_dir.working_copy import on_disk


def fetch_artifact(address: str) -> Path:
    """Returns a folder with the artifact at an address; its hashes are checked by whoever reads it.

    Args:
        address: an export directory, or a run directory with one.

    Raises:
        ArtifactError: there is none.
        StoreError: the store does not answer.
        RunDirError: this machine's disk is full or read-only.
    """
    store = Store(address)
    there = store.sizes()
    within = next((folder for folder in ("", "export/") if folder + MANIFEST in there), None)
    if within is None:
        raise ArtifactError(
            f"there is no artifact at {address}: neither {MANIFEST} nor export/{MANIFEST}",
            "give the address of an export directory, or of a run directory with one",
        )
    folder = local_copy(f"{address}/{within}artifact", None)
    files = {
        file: size
        for name, size in there.items()
        if name.startswith(within) and "/" not in (file := name.removeprefix(within)) and not file.startswith(".")
    }
    if _same(folder, files, store.read(within + MANIFEST)):
        return folder
    with on_disk(folder):
        _take(store, within, files, folder)
    return folder


def _take(store: Store, within: str, files: Iterable[str], folder: Path) -> None:
    remove_leftovers(folder.parent)
    fresh, old = beside(folder), beside(folder)
    try:
        fresh.mkdir(parents=True)
        for file in files:
            store.download(within + file, fresh / file)
        if folder.exists():
            os.rename(folder, old)
        os.rename(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _same(folder: Path, files: Mapping[str, int], manifest: bytes | None) -> bool:
    """Tells whether the folder is what was fetched before: its files' bytes are as many, and its manifest is the same.

    files: maps names to bytes.
    """
    try:
        sizes = {file: (folder / file).stat().st_size for file in files}
        return sizes == files and (folder / MANIFEST).read_bytes() == manifest
    except OSError:
        return False
