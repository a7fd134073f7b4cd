"""Saves and reads states in shards on real ranks: a small model under fully_shard, with values made from a number."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dist_train.config.tree import Config, RunConfig
from dist_train.distributed.process_group import join
from dist_train.distributed.world import World
from dist_train.errors import CheckpointError, DistTrainError
from dist_train.run_dir import shard_files
from dist_train.run_dir.checkpoint import CheckpointFolder
from dist_train.run_dir.ledger import NoLedger
from dist_train.run_dir.shards import in_shards
from dist_train.run_dir.snapshot import take
from dist_train.stages.checkpoints import StageCheckpoints
from dist_train.trackers.base import Trackers


class Net(nn.Module):
    """Holds rows that no number of ranks divides, fewer rows than ranks, one tied weight, and buffers."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first = nn.Linear(width, 7)
        self.norm = nn.BatchNorm1d(7)
        self.conv = nn.Conv2d(3, 5, 2)
        self.last = nn.Linear(7, 2)
        self.tied = nn.Linear(width, 7, bias=False)
        self.tied.weight = self.first.weight


def state_of(step: int, mesh: DeviceMesh | None = None, width: int = 5) -> dict[str, Any]:
    """Returns the state after `step`, in shards over `mesh`, or whole."""
    torch.manual_seed(step)
    net = Net(width)
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=mesh)
    tensors = {
        name: {"momentum": each.detach() * 2, "step": torch.tensor(step)} for name, each in net.named_parameters()
    }
    counted = {"step": step, "epoch_open": False, "rates": (0.1, {3: 4.0})}
    return {**counted, "model": net.state_dict(), "optimizer": tensors}


def cpu_mesh(world: World) -> DeviceMesh:
    return init_device_mesh("cpu", (world.world_size,))


def checkpoints_in(world: World, path: str, **settings: Any) -> StageCheckpoints:
    given = {"data": {"name": "fake"}, "model": {"name": "mlp"}, "checkpoint": {"retry": 0, **settings}}
    folder = CheckpointFolder(Path(path))
    return StageCheckpoints(folder, Config.model_validate(given), world, NoLedger(), Trackers([]), dict)


def save(world: World, path: str, steps: int = 1) -> None:
    """Saves a stage's end, with its copy, and steps of the next stage, beside the loop."""
    mesh, checkpoints = cpu_mesh(world), checkpoints_in(world, path)
    checkpoints.save_stage("warm", state_of(0, mesh))
    for step in range(1, steps + 1):
        checkpoints.save_step("train", step, state_of(step, mesh), (), None)
    checkpoints.settle()


def read(world: World, path: str, name: str, step: int) -> dict[str, Any]:
    """Loads a checkpoint in shards; returns how many bytes this rank read, and how many its shards have."""
    mesh, sliced = cpu_mesh(world), [0]
    slice_of = shard_files.ShardFiles._slice

    def counted(*arguments: Any) -> torch.Tensor:
        found = slice_of(*arguments)
        sliced[0] += found.nbytes
        return found

    shard_files.ShardFiles._slice = counted  # type: ignore[method-assign]
    found = CheckpointFolder(Path(path)).load(name, mesh)["payload"]
    parts = [each.to_local() for each in leaves(found) if in_shards(each)]
    own = {each.untyped_storage().data_ptr(): each.nbytes for each in parts}  # a tied one counts once
    torch.testing.assert_close(whole(found), state_of(step), rtol=0, atol=0)
    assert found["model"]["tied.weight"] is found["model"]["first.weight"]
    live = state_of(step + 1, mesh)["model"]
    for key, value in found["model"].items():
        live[key].copy_(value)
    return {"read": sliced[0], "own": sum(own.values()), "refused": refused(mesh)}


def leaves(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [leaf for each in state.values() for leaf in leaves(each)]
    return [state] if isinstance(state, torch.Tensor) else []


def whole(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: whole(each) for key, each in state.items()}
    return state.full_tensor() if in_shards(state) else state


def refused(mesh: DeviceMesh) -> str:
    """Returns how a tensor of which each rank holds a summand is refused."""
    from torch.distributed.tensor import DTensor, Partial

    try:
        take({"x": DTensor.from_local(torch.ones(2), mesh, [Partial()])})
    except CheckpointError as error:
        return error.message
    return ""


def faults(world: World, path: str) -> dict[str, Any]:
    """Brings about failures of the disk on one rank or the other; returns what each left and said."""
    mesh, told = cpu_mesh(world), {}
    real = {name: getattr(os, name) for name in ("fsync", "rename")}

    def failing(name: str, rank: int, number: int, times: int) -> Callable[..., Any]:
        seen = [0]

        def call(*arguments: Any) -> Any:
            if world.rank == rank and threading.current_thread().name == "checkpoint":
                seen[0] += 1
                if number <= seen[0] < number + times:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real[name](*arguments)

        return call

    for case, (name, rank, number, times, retry) in {
        "rank 1's disk is full for a moment": ("fsync", 1, 1, 1, 30),
        "rank 0's disk is full for a moment": ("fsync", 0, 1, 1, 30),
        "rank 0 cannot rename the folder for a moment": ("rename", 0, 2, 1, 30),
        "rank 0 cannot move latest for a moment": ("fsync", 0, 7, 1, 30),
        "rank 1's disk stays full": ("fsync", 1, 1, 1000, 0),  # the last one, as it ends a run
    }.items():
        checkpoints = checkpoints_in(world, f"{path}/{case}", retry=retry)
        checkpoints.save_step("train", 1, state_of(1, mesh), (), None)
        checkpoints.settle()
        setattr(os, name, failing(name, rank, number, times))
        error = ""
        try:
            checkpoints.save_step("train", 2, state_of(2, mesh), (), None)
            checkpoints.settle()
        except DistTrainError as caught:
            error = str(caught)
        setattr(os, name, real[name])
        world.barrier("case")
        told[case] = error
    return told


def _save_for_ever(path: str) -> None:
    torch.set_num_threads(1)
    with join(RunConfig(device="cpu", timeout=120)) as world:
        mesh, checkpoints = cpu_mesh(world), checkpoints_in(world, path)
        newest = checkpoints.newest()
        first = 1 if newest is None else newest["payload"]["step"] + 1
        for step in range(first, 10**6):
            checkpoints.save_step("train", step, state_of(step, mesh, 20_000), (), None)
            world.barrier("step")
            print(step, flush=True)


if __name__ == "__main__":
    _save_for_ever(*sys.argv[1:])
