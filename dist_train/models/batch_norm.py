"""Batch normalization over the rows of all ranks, and the moments of single batches.

Synchronised batch norms have collectives of their own in forward and backward, in addition to those of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dist_train.distributed.world import World
from dist_train.errors import SetupError

_Norm = TypeVar("_Norm", bound=_BatchNorm)
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_forward: ContextVar[tuple[World, int] | None] = ContextVar("synchronised forward", default=None)


@contextmanager
def synchronised(world: World, rows: int) -> Iterator[None]:
    """In this context, synchronised batch norms in training mode normalise by the real rows of all ranks together.

    Outside it they work like plain ones. All ranks must enter it equally often, or they wait for each other forever.

    Args:
        rows: number of real inputs of this rank, counted from the first; the others are normalised but not counted.
    """
    token = _forward.set((world, rows))
    try:
        yield
    finally:
        _forward.reset(token)


@contextmanager
def synchronised_batch_norms(model: nn.Module, world: World) -> Iterator[None]:
    """In this context, the model's batch norms are replaced by synchronised ones on the same parameters and buffers.

    On CUDA these are torch's own. They do not support gloo, for which ours are used.

    Raises:
        SetupError: a batch norm of another class, whose forward may be anything.
    """
    kind = _TorchSyncBatchNorm if world.device.type == "cuda" else SyncBatchNorm
    found = [
        (name, module) for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, _BatchNorm)
    ]
    for name, module in found:
        if type(module) not in _PLAIN:
            raise SetupError(
                f"{name or 'the model'} is a {type(module).__name__}, which sync_batchnorm cannot replace: "
                "its forward is its own",
                "use nn.BatchNorm1d, 2d or 3d there, or --sync_batchnorm false",
            )
        if not name:
            raise SetupError("the model itself is a batch norm, which sync_batchnorm cannot replace", "wrap it")
    replaced = {module: kind.of(module) for _, module in found}
    for name, module in found:
        model.set_submodule(name, replaced[module])
    try:
        yield
    finally:
        for name, module in found:
            module.train(replaced[module].training)
            model.set_submodule(name, module)


class SyncBatchNorm(_BatchNorm):
    """A batch norm for inputs [B, C, ...] of float32, bfloat16 or float16; outputs have the same shape and dtype.

    In the context `synchronised` and in training mode it sums one flat float64 tensor over the ranks per pass:

    - forward, [2 * C + 1]: sum, sum of squares, count.
    - backward, [2 * C]: the gradient's sum, and the sum of its product with the normalised input.
    """

    @classmethod
    def of(cls, plain: _BatchNorm) -> SyncBatchNorm:
        """Makes a synchronised batch norm on the tensors of a plain one."""
        made = cls(
            plain.num_features, plain.eps, plain.momentum, plain.affine, plain.track_running_stats, device="meta"
        )
        return _share(plain, made)

    def _check_input_dim(self, input: Tensor) -> None:
        return  # the plain norm's class checks its own; here 2 and more dimensions are right

    @torch.compiler.disable  # it has collectives, and its context differs at each call
    def forward(self, input: Tensor) -> Tensor:
        now = _forward.get()
        if now is None or not self.training:
            return super().forward(input)
        return self._synchronised(input, *now)

    def _synchronised(self, input: Tensor, world: World, rows: int) -> Tensor:
        outputs, mean, variance, count = _Synchronised.apply(input, self.weight, self.bias, self.eps, world, rows)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            # Where no rank had a row (none could be decoded), the statistics stay.
            weight = ((count > 0) * factor).to(self.running_mean.dtype)
            unbiased = variance * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)
        return outputs


class _TorchSyncBatchNorm(nn.SyncBatchNorm):
    """torch's synchronised batch norm, which gets only the real rows."""

    @classmethod
    def of(cls, plain: _BatchNorm) -> _TorchSyncBatchNorm:
        made = cls(
            plain.num_features, plain.eps, plain.momentum, plain.affine, plain.track_running_stats, device="meta"
        )
        return _share(plain, made)

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        now = _forward.get()
        if now is None or not self.training:
            return _BatchNorm.forward(self, input)
        _, rows = now
        outputs = super().forward(input[:rows])
        # Rows at weight 0 only need to exist.
        return outputs if rows == len(input) else torch.cat([outputs, input[rows:].to(outputs.dtype)])

    def _check_input_dim(self, input: Tensor) -> None:
        return


def _share(plain: _BatchNorm, made: _Norm) -> _Norm:
    for name, parameter in plain.named_parameters(recurse=False):
        made.register_parameter(name, parameter)
    for name, buffer in plain.named_buffers(recurse=False):
        made.register_buffer(name, buffer)
    return made.train(plain.training)


class _Synchronised(torch.autograd.Function):
    """Computes (outputs, mean [C], biased variance [C], count []) over the real rows of all ranks.

    Mean, variance and count are float64, without gradients. The gradient follows Ioffe and Szegedy (arXiv:1502.03167,
    section 3), with all ranks' rows as the batch. Each rank returns its own part of the gradients of weight and bias;
    they are summed over the ranks together with all other gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, world: World, rows: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        real = x[:rows].float()
        count = real.numel() // x.shape[1]
        if count:
            # In float64 from here: the mean's square is subtracted again.
            variance, mean = (each.double() for each in torch.var_mean(real, _but_channels(x), correction=0))
            sums = torch.cat([mean * count, (variance + mean.square()) * count, mean.new_tensor([count])])
        else:
            sums = torch.zeros(2 * x.shape[1] + 1, dtype=torch.float64, device=x.device)
        world.all_reduce(sums, "sum")
        total = sums[-1]
        mean, squares = (sums[:-1] / total.clamp(min=1)).chunk(2)
        variance = (squares - mean.square()).clamp(min=0)
        inverse = torch.rsqrt(variance + eps).float()
        outputs = F.batch_norm(x, mean.float(), variance.float(), weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean.float(), inverse, total)
        ctx.world, ctx.rows = world, rows
        ctx.mark_non_differentiable(mean, variance, total)
        return outputs, mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        x, weight, mean, inverse, total = ctx.saved_tensors
        shape, rows = [1, -1] + [1] * (x.dim() - 2), ctx.rows
        normalised = (x.float() - mean.view(shape)) * inverse.view(shape)
        gradient = grad.float()
        of_bias = gradient[:rows].sum(_but_channels(x))
        of_weight = (gradient[:rows] * normalised[:rows]).sum(_but_channels(x))
        sums = ctx.world.all_reduce(torch.cat([of_bias, of_weight]).double(), "sum") / total.clamp(min=1)
        mean_bias, mean_weight = (each.float().view(shape) for each in sums.chunk(2))
        factor = inverse if weight is None else inverse * weight
        of_x = gradient.clone(memory_format=torch.preserve_format)
        of_x[:rows] -= mean_bias + normalised[:rows] * mean_weight
        of_x = (of_x * factor.view(shape)).to(x.dtype)
        return of_x, None if weight is None else of_weight, None if weight is None else of_bias, None, None, None


def _but_channels(x: Tensor) -> list[int]:
    return [dimension for dimension in range(x.dim()) if dimension != 1]


_STATISTICS = ("running_mean", "running_var")


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Returns the buffers of running means and variances, of modules and of prepared graphs."""
    return [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in _STATISTICS]


def statistics_lookup(model: nn.Module, without: Collection[str] = ()) -> Callable[[], list[Tensor]]:
    """Returns a fast `running_statistics(model)`, for models that assign new tensors to these buffers in forward.

    without: names of modules whose statistics are left out.
    """
    holders = {
        id(buffer): (module, name)
        for place, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in _STATISTICS and place not in without
    }
    return lambda: [module.get_buffer(name) for module, name in holders.values()]


def hold_batch_norms(model: nn.Module, names: Collection[str]) -> None:
    """Keeps these batch norms in evaluation mode, whatever `train()` is called with, until the next call; others go on.

    Copies of the model keep them, too.
    """
    released = False
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm) and name in names:
            # A partial, whose copy belongs to the copied module.
            module.__dict__["train"] = partial(_stay_in_evaluation, module)
            module.training = False
        elif isinstance(module, _BatchNorm) and _is_held(module):
            del module.__dict__["train"]
            released = True
    if released:
        model.train(model.training)


def _stay_in_evaluation(norm: nn.Module, mode: bool = True) -> nn.Module:
    norm.training = False
    return norm


def _is_held(norm: nn.Module) -> bool:
    return getattr(norm.__dict__.get("train"), "func", None) is _stay_in_evaluation


@contextmanager
def batch_moments(model: nn.Module) -> Iterator[None]:
    """In this context, a forward writes its batch's mean and unbiased variance to the running statistics.

    Batch norms normalise by the batch; everything else is in evaluation mode, and so are the batch norms that the
    model's own `train()` keeps there. Modes, momenta and counts of batches are restored at the end.
    """
    modes = {module: module.training for module in model.modules()}
    model.train()
    norms = [
        (module, module.momentum, module.num_batches_tracked)
        for module in modes
        if isinstance(module, _BatchNorm) and module.running_var is not None and module.training
    ]
    counts = [None if count is None else count.clone() for _, _, count in norms]
    model.eval()
    for norm, _, _ in norms:
        norm.training, norm.momentum = True, 1.0
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for (norm, momentum, tracked), count in zip(norms, counts, strict=True):
            norm.momentum = momentum
            if tracked is not None and count is not None:
                tracked.copy_(count)
