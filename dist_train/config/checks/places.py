"""Checks of folders, and of addresses at object stores, that settings name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from dist_train.addresses import mistaken_path, problem_of
from dist_train.config.checks.base import Checks, about
from dist_train.config.tree import Config
from dist_train.errors import Problem

PLACE_CHECKS: Checks = []
_about = partial(about, PLACE_CHECKS)


@_about("run.dir")
def _address(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    if config.store is not None and (problem := problem_of(config.store)):
        message, hint = problem
        yield Problem("run.dir", message, hint=f"--run.dir {hint}" if "://" in hint else hint)


@_about("run.dir", "run.spool", "data.root", "data.cache_dir", "model.init_from", "train.extend_from")
def _folders(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    if isinstance(config.run.dir, Path) and (address := mistaken_path(config.run.dir)):
        yield Problem("run.dir", f"{config.run.dir} is neither a folder nor an address", hint=f"--run.dir {address}")
    folders = {
        "run.spool": config.run.spool,
        "data.root": config.data.root,
        "data.cache_dir": config.data.cache_dir,
        "model.init_from": config.model.init_from,
        "train.extend_from": config.train.extend_from,
    }
    for key, folder in folders.items():
        if folder is not None and (address := mistaken_path(folder)):
            hint = f"copy {address} to this machine, and give that folder: --{key} FOLDER"
            yield Problem(key, f"{address} is an address at a store, and this takes folders only", hint=hint)
