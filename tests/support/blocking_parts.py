"""Registers parts of a run that block at a chosen place, as a user would: --import tests.support.blocking_parts.

HOLD is `place rank count how`. When this rank comes to the place for the count-th time (from 0), it writes the file
`reached` in HOLD_DIR and blocks. It waits until the file `go` exists (how: wait), or for ever in a C call that keeps
the interpreter's lock (how: lock). It does not block, and finds a full disk (how: full). Without HOLD nothing blocks.

The place `disk` is fsync in the thread that writes checkpoints beside the loop, SYNCS times for each.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import dist_train
from dist_train import registry
from dist_train.config.stages import RuleConfig
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.torch_ao.fx import FXBackend
from dist_train.stages.context import Context
from dist_train.stages.export import Export
from dist_train.tasks import Classification
from dist_train.trackers.base import Tracker

SYNCS = 7  # the three files of a checkpoint, its folder; after it is renamed the folder above; latest.json, and again
_seen: Counter[str] = Counter()


def hold(place: str) -> None:
    wanted, rank, count, how = os.environ.get("HOLD", "nowhere 0 0 wait").split()
    if place != wanted or os.environ.get("RANK", "0") != rank:
        return
    _seen[place] += 1
    if _seen[place] != int(count) + 1:
        return
    folder = Path(os.environ["HOLD_DIR"])
    (folder / "reached").touch()
    if how == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if how == "lock":
        mutex = ctypes.create_string_buffer(64)  # a pthread_mutex_t, zeros: of the plain kind
        for _ in range(2):  # the second time never returns, and no signal interrupts it
            ctypes.PyDLL(None).pthread_mutex_lock(mutex)
    while not (folder / "go").exists():
        time.sleep(0.01)


class _Rows(torch.utils.data.Dataset[Any]):
    def __init__(self, rows: int) -> None:
        self._images = torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(rows))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if len(self) == 120:
            hold("data")
        return self._images[index], index % 6


atexit.register(hold, "exit")


def _held_fsync(descriptor: int, fsync: Callable[[int], None] = os.fsync) -> None:
    if threading.current_thread().name == "checkpoint":
        hold("disk")
    fsync(descriptor)


os.fsync = _held_fsync


@dist_train.register_dataset("held")
def held_rows(data: dist_train.DataConfig) -> dist_train.Splits:
    hold("set-up")
    return dist_train.Splits(_Rows(120), _Rows(31), 6, tuple("abcdef"), (), ())


class _Net(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class _Held(nn.Module):
    """Blocks outside the part of the model that a backend traces."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            hold("forward")
        return x


@dist_train.register_model("held")
def held(num_classes: int) -> nn.Module:
    return _Net(num_classes) if os.environ.get("PLAIN") else nn.Sequential(_Held(), _Net(num_classes))


@dist_train.register_task("held")
class Held(Classification):
    def decide(self, outputs: torch.Tensor) -> torch.Tensor:
        hold("evaluate")
        return super().decide(outputs)


@dist_train.register_tracker("held")
class Kept(Tracker):
    def log(self, stage: str, epoch: int, step: int, scalars: Mapping[str, float]) -> None:
        return

    def sync(self) -> None:
        hold("save")


@dist_train.register_quantization_backend("held")
class HeldBackend(FXBackend):
    def check(self, model: nn.Module, rules: Sequence[RuleConfig] = (), example: Tensor | None = None) -> None:
        super().check(model, rules)  # without the trial conversion, so that the stage blocks

    def convert(self, prepared: PreparedModel) -> GraphModule:
        hold("convert")
        return super().convert(prepared)


class HeldExport(Export):
    def _export(self, context: Context) -> dict[str, Any]:
        hold("export")
        return super()._export(context)


registry.stages._entries["export"] = replace(registry.stages._entries["export"], target=HeldExport)
