"""Shards parameters, gradients and optimizer states over the ranks, by torch's fully_shard (FSDP2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from dist_train import trees
from dist_train.config.checks.strategy import Precision
from dist_train.distributed.world import World
from dist_train.errors import SetupError, first_line
from dist_train.strategies.base import Strategy, kept_buffers
from dist_train.strategies.ddp import sum_of_zeros
from dist_train.strategies.shards import gathered, has_shards, local
from dist_train.trees import Tree

Blocks = Sequence[Sequence[str]]
_SHOWN = 4


class FSDP(Strategy):
    """Keeps 1/n of the parameters, gradients and optimizer states on each of n ranks, and one block whole at a time.

    A model is in shards while a stage trains it. Between, each rank holds its parameters whole. Precision is the
    autocast of other strategies rather than FSDP's MixedPrecisionPolicy, which would cast the parameters themselves:
    losses, ranges and int8 decisions would not be those of ddp. Buffers are whole on each rank, as in ddp.py.
    """

    def __init__(self, world: World, precision: Precision) -> None:
        super().__init__(world, precision)
        # Without a mesh of its device, fully_shard of a CPU's model looks for an accelerator (pytorch#132471).
        self.mesh = init_device_mesh(world.device.type, (world.world_size,))
        # A module in shards can neither be copied nor made whole again: of each, the model without its values is kept.
        self._outlines: WeakKeyDictionary[nn.Module, tuple[nn.Module, Blocks]] = WeakKeyDictionary()

    def shard(self, model: nn.Module, blocks: Blocks = ()) -> str:
        self._outlines[model] = _outline(model), blocks
        for parameter in model.parameters():
            if not parameter.is_contiguous():  # fully_shard refuses channels_last
                parameter.data = parameter.data.contiguous()
        for names in blocks:
            self._spread([model.get_submodule(name) for name in names])
        fully_shard(model, mesh=self.mesh)
        names = [name for names in blocks for name in names[:1]]
        listed = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        spread = f"in shards over {self.world.world_size} ranks"
        return f"{spread}, by {len(blocks)} blocks ({listed}) and the rest" if blocks else f"{spread}, as one block"

    def _spread(self, block: list[nn.Module]) -> None:
        fully_shard(block, mesh=self.mesh, reshard_after_forward=self.reshard_after_forward)

    @torch.no_grad()
    def copy(self, model: nn.Module) -> nn.Module:
        outline, blocks = self._outlines[model]
        made, known = copy.deepcopy(outline), dict[nn.Parameter, nn.Parameter]()
        for names in blocks:  # one after the other, so that no rank holds more than one of them whole
            for name in names:
                _give_memory(made.get_submodule(name), self.world.device, torch.contiguous_format, known)
            self._spread([made.get_submodule(name) for name in names])
        _give_memory(made, self.world.device, torch.contiguous_format, known)
        fully_shard(made, mesh=self.mesh)
        for mine, theirs in zip(made.parameters(), model.parameters(), strict=True):
            local(mine).copy_(local(theirs))
        _take_buffers(made, model)
        self._outlines[made] = outline, blocks
        return made

    @contextmanager
    def unsharded(self, model: nn.Module) -> Iterator[None]:
        parts = [each for each in model.modules() if isinstance(each, FSDPModule)] if has_shards(model) else []
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.set_reshard_after_forward(self.reshard_after_forward and part is not model, recurse=False)
                part.reshard()

    @torch.no_grad()
    def whole(self, model: nn.Module, *, everywhere: bool = True) -> nn.Module | None:
        if model not in self._outlines:
            return model
        made: nn.Module | None = None
        values: dict[str, nn.Parameter] = {}
        if everywhere or self.world.is_main:
            device = self.world.device if everywhere else torch.device("cpu")
            made = copy.deepcopy(self._outlines[model][0])
            _give_memory(made, device, torch.preserve_format, {})
            made.to(device)
            values = dict(made.named_parameters())
        for name, parameter in model.named_parameters():
            full = gathered(parameter.detach(), everywhere=everywhere)
            if made is not None:
                values[name].copy_(full)
                values[name].requires_grad_(parameter.requires_grad)
        if made is not None:
            _take_buffers(made, model)
            made.load_state_dict(made.state_dict())  # some modules note what they load
            made.train(model.training)
        return made

    def wrap(self, model: nn.Module) -> nn.Module:
        assert isinstance(model, FSDPModule), "shard() comes first"
        # A parameter may have begun to learn. While it is whole, it is another tensor.
        learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        with self.unsharded(model):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(learns[name])
        # Set-up found that all are used. A rank that leaves one out all the same gives zeros, as no rank may wait.
        model.set_reduce_scatter_unused_params(not self.find_unused_parameters)
        return model

    @contextmanager
    def no_sync(self, wrapped: nn.Module) -> Iterator[None]:
        assert isinstance(wrapped, FSDPModule)
        wrapped.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            wrapped.set_requires_gradient_sync(True)

    def warm_up_buckets(self, wrapped: nn.Module, inputs: Tree) -> None:
        """Runs a throwaway step, in which a model that cannot be trained in shards fails.

        Raises:
            SetupError: a parameter is read outside its block's forward, or no gradient comes back to the shards.
        """
        try:
            with kept_buffers(wrapped):
                with self.autocast():
                    outputs = trees.call(wrapped, inputs)
                sum_of_zeros(outputs).backward()
        except RuntimeError as error:
            if isinstance(error, NotImplementedError) and "Sparse" in str(error):
                raise SetupError(
                    "a parameter has sparse gradients, which fully_shard cannot reduce", "sparse=False in its embedding"
                ) from error
            if "DTensor" not in str(error):
                raise
            raise SetupError(
                f"a block's parameters are read outside of its forward, where they are in shards: {first_line(error)}",
                "--fsdp.wrap '[]' shards the model as one block; or name other modules there, or --strategy ddp",
            ) from error
        if all(each.grad is None for each in wrapped.parameters()):
            raise SetupError(
                "no gradient comes back to the shards: the model's outputs are hidden from fully_shard",
                "return a tensor, or a dict, tuple or list of tensors; or --strategy ddp",
            )
        wrapped.zero_grad(set_to_none=True)


def _outline(model: nn.Module) -> nn.Module:
    """Returns a copy of a model without memory for its parameters."""
    memo = {
        id(each): nn.Parameter(torch.empty_like(each, device="meta"), requires_grad=each.requires_grad)
        for each in model.parameters()
    }
    return copy.deepcopy(model, memo)


def _give_memory(
    module: nn.Module, device: torch.device, layout: torch.memory_format, known: dict[nn.Parameter, nn.Parameter]
) -> None:
    """Gives memory to the parameters of an outline. known: those that have got some, as tied ones are one."""
    for owner in module.modules():
        for name, each in owner._parameters.items():
            if each is not None and each.is_meta:
                if each not in known:
                    empty = torch.empty_like(each, device=device, memory_format=layout)
                    known[each] = nn.Parameter(empty, requires_grad=each.requires_grad)
                owner._parameters[name] = known[each]


def _take_buffers(made: nn.Module, model: nn.Module) -> None:
    theirs = dict(model.named_buffers())
    for name, buffer in made.named_buffers():
        buffer.copy_(theirs[name])
