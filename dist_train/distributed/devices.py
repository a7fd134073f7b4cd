"""The device of a rank: a GPU of its own, or the CPU."""

from __future__ import annotations

import os

import torch

from dist_train.errors import SetupError


def visible_gpus() -> int:
    """Returns the number of GPUs that torch shows this process."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def choose_device(requested: str, local_rank: int, visible: int, hidden_by: str | None = None) -> torch.device:
    """Returns the device of a rank.

    Where a rank sees fewer GPUs than its node has ranks, each has some of its own (`srun --gpus-per-task=1` shows each
    task one, as number 0) or some share one. A rank cannot tell which: `check_addresses` compares all ranks' GPUs, by
    `gpu_identity`. The number is the one that accelerate and DeviceMesh choose.

    Args:
        requested: `run.device`: "auto", "cpu" or "cuda".
        visible: number of GPUs that this process sees, of `visible_gpus`.
        hidden_by: value of CUDA_VISIBLE_DEVICES, for the error.

    Raises:
        SetupError: CUDA is requested, and no GPU is visible.
    """
    if requested == "cuda" and visible == 0:
        raise SetupError(
            "run.device is cuda, but torch sees no CUDA devices"
            + (f": CUDA_VISIBLE_DEVICES is {hidden_by!r}" if hidden_by is not None else ""),
            "--run.device auto; dist-train doctor says what is missing",
        )
    if requested == "cpu" or visible == 0:
        return torch.device("cpu")
    return torch.device("cuda", local_rank % visible)


def gpu_identity(device: torch.device) -> str:
    """Returns a name of the GPU that is the same for all processes, and different for all GPUs; "" for the CPU."""
    if device.type != "cuda":
        return ""
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    # Slices of one GPU (MIG) may all have the GPU's UUID; with them a process sees the first only.
    return visible[0].strip() if visible[0].strip().startswith("MIG-") else uuid
