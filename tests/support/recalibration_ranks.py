"""Code that real ranks run in tests of an averaged model, whose statistics are re-estimated from all ranks' batches."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_train.data.arrays import ImageArrays
from dist_train.data.augment.steps import Augmentation
from dist_train.data.loader import EstimationLoader, Source
from dist_train.distributed.world import World
from dist_train.models.batch_norm import running_statistics
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from dist_train.training.recalibration import estimate_moments, estimate_ranges
from tests.support.one_net_all_backends import StubNet, backend
from tests.support.tiny_nets import calibrate

SAMPLES, ROWS, BATCHES = 50, 8, 7  # of 7 or 8 rows; of three ranks the first has a batch more
BRIGHTEST = 1.0


def reestimated(world: World, names: list[str]) -> dict[str, dict[str, Any]]:
    """Moments and ranges of a moving average per backend, before and after its statistics are re-estimated."""
    return {name: _reestimated(world, name) for name in names}


def _reestimated(world: World, name: str) -> dict[str, Any]:
    images = torch.randint(0, 120, (80, 3, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    torch.manual_seed(2)
    prepared = backend(name).prepare(StubNet().eval(), images[:2] / 255)
    calibrate(prepared, images[:8] / 255)
    averaged = AveragedModel(prepared, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(prepared)  # the first one copies
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.mul_(1.5)
    averaged.update_parameters(prepared)
    model = averaged.module
    assert isinstance(model, PreparedModel)
    augmentation = Augmentation([], seed=0, mean=(0.0,) * 3, std=(1.0,) * 3)
    source = Source(ImageArrays(images, torch.arange(80)), augmentation, world.device, False, 0, 0)
    batches = list(EstimationLoader(source, SAMPLES, ROWS, 1, 1, 0))
    assert len(batches) == BATCHES
    images[batches[2].ids[3], 0, 0, 0] = 255  # of three ranks the last one has it
    before = _found(model)
    for estimate in (estimate_moments, estimate_ranges):
        estimate(model, EstimationLoader(source, SAMPLES, ROWS, 1, world.world_size, world.rank), world)
    return {"before": before, "after": _found(model)}


def _found(model: PreparedModel) -> dict[str, Any]:
    low, high = Ranges(model).bounds()
    moments = torch.cat([buffer.flatten() for buffer in running_statistics(model)])
    return {"moments": moments.tolist(), "low": low.tolist(), "high": high.tolist(), "digest": Ranges(model).digest()}
