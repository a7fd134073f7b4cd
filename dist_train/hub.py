"""Hugging Face's names: a folder, or a repository of the hub; and what to type where neither can be read."""

from __future__ import annotations

import functools
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from dist_train.errors import DataError, DistTrainError, first_line

PREFIX = "hf/"
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of a repository of the hub
_PATIENCE = 5.0  # seconds
_PORTS = {"http": 80, "https": 443}  # small images have no /etc/services, which the socket module asks


def bare(name: str) -> str:
    """Returns the folder or the name on the hub of a model or dataset `hf/...`."""
    return name.removeprefix(PREFIX)


@contextmanager
def reading(what: str, name: str, asks: bool = True) -> Iterator[None]:
    """Turns an error of Hugging Face's libraries in the body into a DataError that says what to type.

    what: "model", "dataset" or "tokenizer"; name: folder, or name on the hub.
    asks: False where the body asks the hub for nothing, whatever the name is.
    """
    if asks and not Path(name).exists() and _NAME.fullmatch(name):
        _not_reached()
    try:
        yield
    except DistTrainError:
        raise
    except Exception as error:  # of many kinds: of configurations, builders, networks, pyarrow
        raise _not_read(what, name, error) from error


@functools.cache
def _not_reached() -> str:
    """Tells why there is no way to the hub, "" where there is; then only files fetched before are read.

    Otherwise Hugging Face's libraries ask for each file again and again, a minute in all.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    hub = urlsplit(constants.ENDPOINT)
    if hub.hostname is None or hub.scheme not in _PORTS or getproxies().keys() & {hub.scheme, "all"}:
        return ""
    try:
        socket.create_connection((hub.hostname, hub.port or _PORTS[hub.scheme]), _PATIENCE).close()
    except OSError as error:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for datasets, which is imported later, and for processes
        constants.HF_HUB_OFFLINE = True
        return f"no way to {hub.hostname}: {first_line(error)}"
    return ""


def _not_read(what: str, name: str, error: Exception) -> DataError:
    text, said = str(error), f"{type(error).__name__}: {first_line(error)}"
    if "trust_remote_code" in text or "custom code" in text or "scripts are no longer supported" in text:
        hint = "give one that transformers or datasets know by themselves, or your own: --import MODULE"
        return DataError(f"the {what} {name} brings code of its own, which is never run", hint)
    if Path(name).exists():
        return DataError(
            f"the {what} of {name} cannot be read: {said}", f"look into that folder, or name another {what}"
        )
    if not _NAME.fullmatch(name):
        return DataError(f"there is no folder {name}", f"a folder, or a name on the hub, as in hf/OWNER/{what.upper()}")
    if isinstance(error, OSError):  # errors of networks are, too
        said = _not_reached() or said
        folder = name.rpartition("/")[2] or name
        kind = " --repo-type dataset" if what == "dataset" else ""
        return DataError(
            f"there is no folder {name}, and the {what} {name} cannot be read from the hub: {said}",
            f"where there is a network: hf download {name}{kind} --local-dir {folder}; then name that folder",
        )
    return DataError(f"the {what} {name} cannot be made: {said}", f"look at the arguments of the {what}")
