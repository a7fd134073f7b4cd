"""The device that a rank uses, by what torch says of the GPUs that it sees."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dist_train.config.tree import RunConfig
from dist_train.distributed.devices import choose_device, gpu_identity
from dist_train.distributed.process_group import join
from dist_train.errors import EXIT_CONFIG, SetupError


def see(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize(
    ("requested", "gpus", "local_rank", "ranks", "device"),
    [
        ("auto", 4, 3, 4, "cuda:3"),
        ("cuda", 8, 1, 2, "cuda:1"),
        ("auto", 1, 0, 4, "cuda:0"),  # srun --gpus-per-task=1: each task has its own
        ("auto", 1, 3, 4, "cuda:0"),
        ("cuda", 1, 3, 4, "cuda:0"),
        ("cuda", 2, 3, 4, "cuda:0"),  # srun --gpus-per-task=2
        ("auto", 0, 1, 2, "cpu"),
        ("cpu", 4, 1, 2, "cpu"),
    ],
)
def test_a_rank_uses_the_gpu_that_it_sees(
    requested: str, gpus: int, local_rank: int, ranks: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, gpus)
    assert str(choose_device(requested, local_rank, ranks)) == device


def test_cuda_without_a_gpu_is_refused_with_what_hides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with (
        pytest.raises(SetupError, match="torch sees no CUDA devices: CUDA_VISIBLE_DEVICES is ''") as caught,
        join(RunConfig(device="cuda")),
    ):
        pytest.fail("a world on a GPU that is not there")
    assert caught.value.exit_code == EXIT_CONFIG


def test_slices_of_one_gpu_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="one"))
    gpu = torch.device("cuda", 0)
    assert gpu_identity(torch.device("cpu")) == "" and gpu_identity(gpu) == "one"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-7")
    assert gpu_identity(gpu) == "MIG-7"
