"""Warns where a stage's training needs more memory than the device of a rank has left."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import torch
from torch import nn

from dist_train.config.fit import FitConfig
from dist_train.config.tree import Config
from dist_train.distributed.world import World
from dist_train.errors import Problem

_GIB = 2**30
_STATES = {"sgd": 0, "adam": 2, "adamw": 2}  # tensors of a parameter's size; sgd has one more with momentum


def little_memory(config: Config, model: nn.Module, world: World) -> Iterator[Problem]:
    """Warns where gradients, optimizer states and moving average do not fit beside the model, which is there already.

    Activations come on top, so that no warning is no promise.
    """
    if config.strategy not in ("auto", "single", "ddp", "dp"):
        return
    free = free_memory(world)
    for stage in config.stages:
        settings = getattr(config, stage, None)
        if isinstance(settings, FitConfig) and (needed := bytes_to_train(model, settings)) > free:
            message = (
                f"{stage} holds {needed / _GIB:.3g} GiB of gradients, optimizer states and moving average on each rank "
                f"beside the model, and {world.device.type} has {free / _GIB:.3g} GiB left for this one"
            )
            ranks = f"the {world.world_size} ranks" if world.world_size > 1 else "several ranks, which this run has not"
            yield Problem("strategy", message, hint=f"--strategy fsdp, which spreads them over {ranks}")
            return


def bytes_to_train(model: nn.Module, settings: FitConfig) -> int:
    """Returns the bytes of what training holds beside the model: gradients, optimizer states and moving average."""
    optim = settings.optim
    states = _STATES.get(optim.name, 1) + (optim.name == "sgd" and optim.momentum > 0)
    learning = sum(each.nbytes for each in model.parameters() if each.requires_grad)
    average = sum(each.nbytes for each in model.parameters()) if settings.ema_decay is not None else 0
    return learning * (1 + states) + average


def free_memory(world: World) -> int:
    """Returns the bytes that are free for this rank: on its GPU, or its share of the node's memory."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    return int(psutil.virtual_memory().available) // world.local_world_size
