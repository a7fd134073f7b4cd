"""Hugging Face accelerate: the Accelerator wraps, casts and runs backward, as the user's `accelerate config` says."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.config.checks.strategy import Precision
from dist_train.distributed.world import World
from dist_train.errors import SetupError
from dist_train.strategies.base import Strategy
from dist_train.strategies.ddp import warm_up_ddp


class Accelerate(Strategy):
    """Works in the process group that `join` formed; the loop, the data and the checkpoints stay ours.

    Of accelerate's plugins DDP alone works: config/checks/strategy.py refuses the others. As in ddp.py, buffers are
    not broadcast.
    """

    def __init__(self, world: World, precision: Precision) -> None:
        """Raises SetupError where the accelerate config wants another device than the ranks have, or fp16 on a CPU."""
        if precision == "fp16" and world.device.type == "cpu":
            raise SetupError(
                "accelerate ignores fp16 on a CPU", "accelerate launch --mixed_precision bf16 ..., or --strategy ddp"
            )
        self._accelerator = _accelerator(world, precision)
        if self._accelerator.device.type != world.device.type:
            raise SetupError(
                f"the accelerate config runs on {self._accelerator.device.type}, and these ranks on {world.device.type}",
                f"--run.device {self._accelerator.device.type}, or change use_cpu in `accelerate config`",
            )
        super().__init__(world, precision)

    def new_scaler(self) -> None:
        super().new_scaler()
        if self._accelerator.scaler is not None:
            self._accelerator.scaler = self.scaler

    def wrap(self, model: nn.Module) -> nn.Module:
        # In a shell: prepare_model replaces `forward` of what it is given, and the model is evaluated and saved bare.
        # It stays where it is: moving it from "cpu" to "cpu:0" would replace its buffers.
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "`broadcast_buffers` is deprecated"
            )  # accelerate 1.15 knows no other name
            wrapped: nn.Module = self._accelerator.prepare_model(_Shell(model), device_placement=False)
        self._accelerator._models.clear()  # a stage's model would live as long as the process
        return wrapped

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        if isinstance(wrapped, DistributedDataParallel):
            context: AbstractContextManager[None] = wrapped.no_sync()
            return context
        return nullcontext()

    def warm_up_buckets(self, wrapped: nn.Module, inputs: torch.Tensor) -> None:
        if isinstance(wrapped, DistributedDataParallel):
            warm_up_ddp(self, wrapped, inputs)

    def autocast(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = self._accelerator.autocast()
        return context

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)


class _Shell(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.model(x)
        return outputs


def _accelerator(world: World, precision: Precision) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)  # it is one for the process: an earlier run's would stay
    buffers = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS/MKL_NUM_THREADS unset")
        accelerator = Accelerator(
            cpu=world.device.type == "cpu",
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=[buffers],
        )
    torch.set_num_threads(threads)  # which it sets too; they are the config's
    return accelerator
