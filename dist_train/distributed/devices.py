"""The device of a rank: a GPU of its own, or the CPU."""

from __future__ import annotations

import os

import torch

from dist_train.errors import SetupError


def choose_device(requested: str, local_rank: int, local_world_size: int) -> torch.device:
    """Returns the device of a rank.

    A rank that sees fewer GPUs than its node has ranks uses its first: launchers such as `srun --gpus-per-task=1` show
    each rank its own GPU as number 0. `check_addresses` compares the ranks' GPUs, by `gpu_identity`.

    Args:
        requested: `run.device`: "auto", "cpu" or "cuda".

    Raises:
        SetupError: CUDA is requested, and torch sees no CUDA device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if requested == "cuda" and count == 0:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise SetupError(
            "run.device is cuda, but torch sees no CUDA devices"
            + (f": CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else ""),
            "--run.device auto; dist-train doctor says what is missing",
        )
    if requested == "cpu" or count == 0:
        return torch.device("cpu")
    return torch.device("cuda", local_rank if count >= local_world_size else 0)


def gpu_identity(device: torch.device) -> str:
    """Returns a name of the GPU that is the same for all processes, and different for all GPUs; "" for the CPU."""
    if device.type != "cuda":
        return ""
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    # Slices of one GPU (MIG) may all have the GPU's UUID; with them a process sees the first only.
    return visible[0].strip() if visible[0].strip().startswith("MIG-") else uuid
