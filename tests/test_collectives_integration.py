"""debug.collectives: ranks that call different collectives end at once, and each says who called what, and where."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import torch.distributed as dist

from dist_train.cli import report_errors
from dist_train.collectives import mismatch
from dist_train.config import RunConfig
from dist_train.world import World, join
from tests.ranks import Ranks

GONE = 60.0


def _operation(world: World) -> None:
    world.barrier("before")
    if world.rank == 1:
        dist.broadcast(torch.ones(3), src=0)
    else:
        dist.all_reduce(torch.ones(3))


def _shape(world: World) -> None:
    dist.all_reduce(torch.ones(3 + world.rank))
