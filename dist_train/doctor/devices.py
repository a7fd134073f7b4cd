"""Checks the devices of the ranks: CPU and GPUs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from dist_train.doctor.base import Line, Subject, bad, good, warning
from dist_train.errors import EXIT_CONFIG


def check(subject: Subject) -> Iterator[Line]:
    import torch

    cores = len(os.sched_getaffinity(0))
    yield good(f"CPU: {torch.backends.cpu.get_cpu_capability()}{_half()}, {cores} cores")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        yield good(
            f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {capability}"
        )
    if count:
        yield good(f"CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    elif subject.device == "cuda":
        yield bad(f"run.device is cuda, but torch sees no CUDA devices{_why()}", "--run.device auto", EXIT_CONFIG)
    elif shutil.which("nvidia-smi") is not None:
        hint = "nvidia-smi; a torch build for its driver (pytorch.org/get-started); CUDA_VISIBLE_DEVICES"
        yield warning(f"nvidia-smi is here, but torch sees no CUDA devices{_why()}", hint)
    else:
        yield good("no CUDA devices: ranks run on the CPU")


def _why() -> str:
    import torch

    if torch.version.cuda is None:
        return f": torch {torch.__version__} is a build without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if hidden is None else f": CUDA_VISIBLE_DEVICES is {hidden!r}"


def _half() -> str:
    import torch

    if torch.cpu._is_amx_tile_supported():
        return ", bf16 by AMX"
    return ", bf16 by AVX-512" if torch.cpu._is_avx512_bf16_supported() else ""
