"""Finds parameters that get no gradient, before the first step and on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dist_train import trees
from dist_train.distributed.world import World
from dist_train.errors import ModelError
from dist_train.trees import Tree

_TRIALS = 8  # passes of a model that draws random numbers, which may leave out other layers each time
_SHOWN = 4


@dataclass(frozen=True)
class Unused:
    """Names of trainable parameters.

    Attributes:
        always: parameters that no trial used.
        at_times: parameters that some trials used, as of layers that are dropped at random.
    """

    always: list[str]
    at_times: list[str]

    def __bool__(self) -> bool:
        return bool(self.always or self.at_times)

    def lines(self, stage: str) -> list[str]:
        """Returns a warning about `always` and one about `at_times`, where there are any."""
        found = []
        if self.always:
            found.append(
                f"{stage}: the model does not use {_listed(self.always)}: no gradient, so the values stay\n"
                "  -> take the layer out, or freeze it: parameter.requires_grad_(False)"
            )
        if self.at_times:
            found.append(
                f"{stage}: some steps do not use {_listed(self.at_times)}\n"
                "  -> nothing to do: such a step leaves the values as they are, unless another rank uses them"
            )
        return found

    def refusal(self, stage: str) -> ModelError:
        """Returns the error for several ranks that are not to look for unused parameters."""
        return ModelError(
            f"{stage}: some steps do not use {_listed([*self.always, *self.at_times])}, and find_unused_parameters is "
            "false: the ranks would wait for gradients that never come",
            "--find_unused_parameters auto, or true; or take the layer out of the model, or freeze it",
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} parameter{'s' if len(names) > 1 else ''}: {', '.join(names[:_SHOWN])}{more}"


def find_unused(
    model: nn.Module,
    example: Tree,
    world: World,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Unused:
    """Runs forward and backward on `example` in training mode, without changing the model. Collective.

    Modules of dropout are off. If the forward draws random numbers all the same, it is repeated with other seeds.

    Args:
        example: inputs [B, ...], equal on all ranks.

    Raises:
        ModelError: no parameter can be trained.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        count = sum(1 for _ in model.parameters())
        reason = f"all {count} have requires_grad=False" if count else "it has none at all"
        raise ModelError(
            f"the model has no parameter to train: {reason}",
            "parameter.requires_grad_(True) for those that are to learn; leave the stages train and qat out otherwise",
        )
    mode = model.training
    model.train()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.training = False
    trials = []
    try:
        for seed in range(_TRIALS):
            used, random = _trial(model, trained, example, seed, autocast)
            trials.append(used)
            if not random:
                break
    finally:
        model.train(mode)
    # Each rank counts, so that all wrap the model alike even where it takes a branch on one rank only.
    trials = [set(used) for answers in world.gather([sorted(used) for used in trials]) for used in answers]
    ever, each = set.union(*trials), set.intersection(*trials)
    if not ever:
        raise ModelError(
            "none of the model's parameters gets a gradient",
            "look for torch.no_grad(), .detach() or .data in its forward",
        )
    return Unused([name for name in trained if name not in ever], [name for name in trained if name in ever - each])


def _trial(
    model: nn.Module,
    trained: dict[str, nn.Parameter],
    example: Tree,
    seed: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> tuple[set[str], bool]:
    """Returns the parameters that a pass used, and whether its forward drew random numbers."""
    used: set[str] = set()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    device = trees.first_leaf(example).device
    devices = [device] if device.type == "cuda" else []

    def note(name: str, parameter: Tensor) -> None:
        used.add(name)

    hooks = [parameter.register_post_accumulate_grad_hook(partial(note, name)) for name, parameter in trained.items()]
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(seed)
            before = _generators(device)
            with autocast():
                outputs = torch.func.functional_call(model, buffers, *trees.arguments(example))
            random = _generators(device) != before
            sums = [leaf.float().sum() for leaf in _tensors(outputs) if leaf.requires_grad]
            if sums:
                torch.stack(sums).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained.values():
            parameter.grad = None
    return used, random


def _tensors(outputs: object) -> list[Tensor]:
    return [leaf for leaf in trees.leaves(trees.plain(outputs)) if isinstance(leaf, Tensor)]


def _generators(device: torch.device) -> list[bytes]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return [state.numpy().tobytes() for state in states]
