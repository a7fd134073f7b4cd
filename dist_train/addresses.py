"""Tells the address of a place at an object store, such as s3://bucket/runs/x, from a folder's path."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from dist_train.errors import did_you_mean, first_line

_ADDRESS = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
_IN_A_PATH = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]+):/+")  # pathlib leaves one / of two
_IN_THIS_PROCESS = ("memory", "local", "reference", "cached", "simplecache", "filecache", "blockcache")


def is_address(text: str) -> bool:
    """True for what names a place at a store, such as s3://bucket/runs/x, and no folder."""
    return _ADDRESS.fullmatch(text) is not None


def mistaken_path(path: Path) -> str | None:
    """Returns what a path that was typed as an address means, such as s3://bucket/x of s3:/bucket/x; None of others."""
    match = _IN_A_PATH.match(str(path))
    if match is None or path.exists():
        return None
    return f"{match['protocol']}://{str(path)[match.end() :]}"


def place(value: Any) -> Any:
    """Returns a setting's value: of file:// the folder's path, of another address the same without its last /."""
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    if match["protocol"].lower() == "file":
        return match["rest"]
    return f"{match['protocol'].lower()}://{match['rest'].rstrip('/')}"


def problem_of(address: str) -> tuple[str, str] | None:
    """Says why an address cannot be a run's, and what to type instead; None where it can. Asks no store."""
    import fsspec  # a tenth of a second

    match = _ADDRESS.fullmatch(address)
    assert match is not None
    protocol, rest = match["protocol"], match["rest"]
    if protocol in _IN_THIS_PROCESS:
        return f"{protocol}:// does not outlive this process, or is no store", "a folder, or s3://BUCKET/FOLDER"
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        guess = did_you_mean(protocol, fsspec.available_protocols(), count=1)
        return f"{protocol}:// is no protocol of fsspec", guess or "a folder, or s3://BUCKET/FOLDER"
    except ImportError as error:
        extra = " (or dist_train's extra `remote`)" if protocol in ("s3", "s3a") else ""
        return f"{protocol}:// needs a library that is not installed: {first_line(error)}", f"install it{extra}"
    if "@" in rest.split("/")[0]:
        return "the address holds a name or a password, and would be printed and written to files", (
            "give credentials as the store's library takes them: variables, or its own files"
        )
    parts = rest.split("/")
    if len(parts) < 2 or not all(parts) or {".", ".."} & set(parts):
        return f"{address} names no folder in a bucket", f"{protocol}://BUCKET/FOLDER"
    if odd := re.search(r"[\x00-\x1f*?\[\]]", rest):
        return (
            f"{address!r} holds {odd[0]!r}, which stores' libraries take for a pattern",
            f"{protocol}://BUCKET/FOLDER",
        )
    return None


def local_copy(address: str, within: Path | None) -> Path:
    """Returns the folder on this machine for the working copy of what is at `address`.

    within: folder of all working copies; None: dist_train/runs in the user's cache.
    """
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", address.rpartition("/")[2])[:80]
    if within is None:
        within = _cache() / "dist_train" / "runs"
    return within / f"{name}-{digest}"


def _cache() -> Path:
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # no HOME, and a user id without a name, as in some containers
        return Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
