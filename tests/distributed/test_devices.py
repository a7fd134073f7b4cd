"""The device that a rank uses, by what torch says of the GPUs that it sees."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dist_train.config.tree import RunConfig
from dist_train.distributed.devices import choose_device, gpu_identity
from dist_train.distributed.process_group import join, without_own_gpu
from dist_train.errors import EXIT_CONFIG, SetupError


@pytest.mark.parametrize(
    ("requested", "visible", "local_rank", "device"),
    [
        ("auto", 4, 3, "cuda:3"),
        ("cuda", 8, 1, "cuda:1"),
        ("auto", 1, 0, "cuda:0"),  # srun --gpus-per-task=1: each task has its own, as number 0
        ("auto", 1, 3, "cuda:0"),
        ("cuda", 1, 3, "cuda:0"),
        ("cuda", 2, 3, "cuda:1"),  # srun --gpus-per-task=2; accelerate chooses the same
        ("auto", 0, 1, "cpu"),
        ("cpu", 4, 1, "cpu"),
    ],
)
def test_a_rank_uses_a_gpu_that_it_sees(requested: str, visible: int, local_rank: int, device: str) -> None:
    assert str(choose_device(requested, local_rank, visible)) == device


def test_cuda_without_a_gpu_is_refused_with_what_hides_them() -> None:
    with pytest.raises(SetupError, match="torch sees no CUDA devices: CUDA_VISIBLE_DEVICES is ''") as caught:
        choose_device("cuda", 0, 0, hidden_by="")
    assert caught.value.exit_code == EXIT_CONFIG


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_world_is_formed_on_a_gpu_that_is_not_there() -> None:
    with pytest.raises(SetupError, match="torch sees no CUDA devices"), join(RunConfig(device="cuda")):
        pytest.fail("a world on a GPU that is not there")


def test_ranks_that_would_share_a_gpu_are_refused_where_gpus_were_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    shared = "ranks 2 and 3 on gpu1 would share one GPU, GPU-3"
    with pytest.raises(SetupError, match=shared) as caught:
        without_own_gpu("auto", shared, "slurm", rank=3)
    assert caught.value.exit_code == EXIT_CONFIG and "srun --gpus-per-task=1" in caught.value.hint
    with pytest.raises(SetupError, match=shared):
        without_own_gpu("cuda", shared, "torchrun", rank=3)
    assert str(without_own_gpu("auto", shared, "torchrun", rank=0)) == "cpu"
    assert f"{shared}; all ranks use the CPU" in capfd.readouterr().err


def test_slices_of_one_gpu_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="one"))
    gpu = torch.device("cuda", 0)
    assert gpu_identity(torch.device("cpu")) == "" and gpu_identity(gpu) == "one"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-7")
    assert gpu_identity(gpu) == "MIG-7"
