"""Trains through Hugging Face accelerate: its Accelerator wraps, casts and runs backward, by `accelerate config`."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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
from dist_train.strategies.ddp import require_all_reduced, warm_up_ddp
from dist_train.trees import Tree


class Accelerate(Strategy):
    """Wraps the model by accelerate, in the process group that `join` formed.

    The loop, the data and the checkpoints are dist_train's own. Of accelerate's plugins only DDP is supported;
    config/checks/strategy.py refuses the others. As in ddp.py, buffers are not broadcast.
    """

    def __init__(self, world: World, precision: Precision) -> None:
        """Raises SetupError if the accelerate config asks for another device than the ranks', or for fp16 on a CPU."""
        if precision == "fp16" and world.device.type == "cpu":
            raise SetupError(
                "accelerate ignores fp16 on a CPU", "accelerate launch --mixed_precision bf16 ..., or --strategy ddp"
            )
        self._accelerator = _accelerator(world, precision)
        if self._accelerator.device.type != world.device.type:
            raise SetupError(
                f"the accelerate config runs on {self._accelerator.device.type}, these ranks on {world.device.type}",
                f"--run.device {self._accelerator.device.type}, or change use_cpu in `accelerate config`",
            )
        super().__init__(world, precision)

    def new_scaler(self) -> None:
        super().new_scaler()
        if self._accelerator.scaler is not None:
            self._accelerator.scaler = self.scaler

    def wrap(self, model: nn.Module) -> nn.Module:
        # The model goes into a shell because prepare_model replaces `forward` of its argument, but the model is
        # evaluated and saved unwrapped. It is not moved: from "cpu" to "cpu:0" would replace its buffers.
        assert self._accelerator.ddp_handler is not None
        self._accelerator.ddp_handler.find_unused_parameters = self.find_unused_parameters
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "`broadcast_buffers` is deprecated"
            )  # accelerate 1.15 passes the old name
            wrapped: nn.Module = self._accelerator.prepare_model(_Shell(model), device_placement=False)
        self._accelerator._models.clear()  # it would keep every stage's model alive
        return wrapped

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        if isinstance(wrapped, DistributedDataParallel):
            context: AbstractContextManager[None] = wrapped.no_sync()
            return context
        return nullcontext()

    def warm_up_buckets(self, wrapped: nn.Module, inputs: Tree) -> None:
        if isinstance(wrapped, DistributedDataParallel):
            warm_up_ddp(self, wrapped, inputs)

    def require_all_reduced(self, wrapped: nn.Module) -> None:
        if isinstance(wrapped, DistributedDataParallel):
            assert isinstance(wrapped.module, _Shell)
            model = wrapped.module.model
            require_all_reduced(wrapped, [name for name, each in model.named_parameters() if each.requires_grad])

    def autocast(self) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = self._accelerator.autocast()
        return context

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)


class _Shell(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def _accelerator(world: World, precision: Precision) -> Accelerator:
    # A singleton of the process, which would keep the state of an earlier run.
    AcceleratorState._reset_state(reset_partial_state=True)
    buffers = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "OMP_NUM_THREADS/MKL_NUM_THREADS unset")
        accelerator = Accelerator(
            cpu=world.device.type == "cpu",
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=[buffers],
        )
    torch.set_num_threads(threads)  # Accelerator changes them; the config's value holds
    return accelerator
