"""Long work that makes progress does not count as a stuck rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_train.config.stages import PTQConfig, QATConfig
from dist_train.data.arrays import Batch
from dist_train.distributed.watchdog.heartbeat import Heartbeat
from dist_train.distributed.world import World
from dist_train.quantization.backend import build_backend
from dist_train.stages.ptq import initialise_ranges


@pytest.mark.parametrize(("ranges", "passes"), [("min_max", 1), ("mse", 2)])
def test_a_calibration_beats_with_each_batch(ranges: str, passes: int) -> None:
    world, rows = World(heartbeat=Heartbeat(timeout=5.0)), torch.randn(12, 6)
    backend = build_backend(QATConfig.model_validate({"backend": "fx"}))
    net = backend.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), rows[:2], [])
    beats = []

    def look(*_: object) -> None:
        beats.append((world.heartbeat.phase, world.heartbeat.limit))
        world.heartbeat.enter("update", at_least=1000.0)

    net.register_forward_pre_hook(look)
    batches = [Batch(torch.arange(4), part, torch.zeros(4)) for part in rows.split(4)]
    initialise_ranges(net, batches, world, PTQConfig.model_validate({"ranges": ranges}))
    assert beats == [("evaluate", 5.0)] * len(batches) * passes
