"""Describes the environment of a run for environment.json, by an allow-list, so that no secret is recorded."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dist_train.distributed.world import World

_PACKAGES = (
    "dist-train",
    "torch",
    "torchvision",
    "torchao",
    "accelerate",
    "wandb",
    "numpy",
    "onnx",
    "onnxscript",
    "openvino",
)
_VARIABLES = (
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "TORCHELASTIC_RESTART_COUNT",
)


def describe(world: World, threads: int, strategy: str, precision: str, engine: str) -> dict[str, Any]:
    """Returns versions, machine, ranks, and the environment variables in `_VARIABLES`."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "device": str(world.device.type),
        "gpu": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None,
        "world_size": world.world_size,
        "local_world_size": world.local_world_size,
        "threads_per_rank": threads,
        "strategy": strategy,
        "precision": precision,
        "qat_engine": engine,
        "commit": _commit(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _commit() -> str | None:
    """Returns the git commit of the working directory; None outside a checkout."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, cwd=Path.cwd(), check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
