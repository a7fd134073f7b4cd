"""Code that real ranks run in tests of ranges: optimizer steps with our or torchao's fake quantization."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchao.quantization.pt2e import FusedMovingAvgObsFakeQuantize

from dist_train.config.stages import PTQConfig
from dist_train.data.arrays import Batch
from dist_train.data.loader import MicroBatch, StepBatch
from dist_train.distributed.world import World
from dist_train.quantization.fake_quantize import ActivationFakeQuantize
from dist_train.quantization.prepared import PreparedModel
from dist_train.quantization.ranges import Ranges
from dist_train.stages.ptq import initialise_ranges
from dist_train.strategies.ddp import DDP
from dist_train.tasks import Classification
from dist_train.training.reduction import StepReduction
from dist_train.training.step import train_step

FEATURES, CLASSES, STEPS, MICRO_BATCHES, ROWS = 6, 4, 3, 3, 4  # rows of a micro-batch
EXTREME = 10.0
AVERAGING = 0.05


class Net(PreparedModel):
    """Two layers, a batch norm in evaluation mode, and one fake-quantize module that is used twice."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.entry, self.shared = make(), make()
        self.first, self.second, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.norm = nn.BatchNorm1d(8)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)  # type: ignore[arg-type]

    @property
    def fixed_fake_quantizers(self) -> list[nn.Module]:
        return []

    def literals(self) -> Iterator[tuple[str, float]]:
        return iter([("norm.eps", self.norm.eps)])

    def keep_dropout(self) -> None:
        raise NotImplementedError("there is none")

    def batch_moments(self) -> AbstractContextManager[None]:
        raise NotImplementedError("nobody asks for them here")

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(F.relu(self.norm(self.first(self.entry(x)))))
        outputs: Tensor = self.last(self.shared(self.second(x)))
        return outputs


def net(make: Callable[[], nn.Module]) -> Net:
    torch.manual_seed(3)
    return Net(make).train()


def data(world_size: int) -> tuple[Tensor, Tensor]:
    """Inputs [steps, ranks, micro-batches, rows, ...] with an outlier in the last rank's first micro-batch."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.rand(STEPS, world_size, MICRO_BATCHES, ROWS, FEATURES, generator=generator) * 2 - 1
    inputs[:, -1, 0, 1, 2] = EXTREME
    targets = torch.randint(0, CLASSES, inputs.shape[:-1], generator=generator)
    return inputs, targets


@contextmanager
def counted() -> Iterator[list[str]]:
    """Counts the all-reduces called from Python in this block, which excludes DDP's gradients."""
    calls: list[str] = []
    reduce = dist.all_reduce

    def spy(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **kwargs: Any) -> Any:
        calls.append(str(op))
        return reduce(tensor, op=op, **kwargs)

    dist.all_reduce = spy
    try:
        yield calls
    finally:
        dist.all_reduce = reduce


def _ends(model: nn.Module) -> list[float]:
    ranges = Ranges(model)
    return torch.cat(ranges.bounds()).tolist()


def ours(world: World, observer: Any) -> dict[str, Any]:
    """Ranges after each step, digests, collectives of a step, and the ranges of one process on all rows."""
    model = net(ActivationFakeQuantize)
    alone = copy.deepcopy(model)
    inputs, targets = data(world.world_size)
    strategy = DDP(world, "fp32")
    ranges = Ranges(model, observer)
    reduction = StepReduction(world, model, ranges, AVERAGING)
    strategy.carried = reduction.size
    wrapped = strategy.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found, digests, collectives = [], [], []
    for step in range(STEPS):
        own = [
            MicroBatch(rows, wanted, ROWS)
            for rows, wanted in zip(inputs[step, world.rank], targets[step, world.rank], strict=True)
        ]
        count = targets[step].numel()
        with counted() as calls:
            batch = StepBatch(list(range(12)), own, count)
            train_step(wrapped, batch, Classification(CLASSES, {}), strategy, reduction)
            reduction.finish(step)
        optimizer.step()
        optimizer.zero_grad()
        found.append(_ends(model))
        digests.append(ranges.digest())
        collectives.append(len(calls))
    return {
        "ends": found,
        "digests": digests,
        "collectives": collectives,
        "alone": _alone(alone, observer, inputs, targets),
    }


def _alone(model: Net, observer: Any, inputs: Tensor, targets: Tensor) -> list[list[float]]:
    ranges, optimizer, found = Ranges(model, observer), torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(STEPS):
        F.cross_entropy(model(inputs[step].flatten(0, 2)), targets[step].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        ranges.update(ranges.observed(), AVERAGING)
        found.append(_ends(model))
    return found


def stock(world: World) -> dict[str, Any]:
    """Does the same as `ours` with torchao's fake quantization in torch's DDP, both unmodified."""

    def make() -> nn.Module:
        quantizer: nn.Module = FusedMovingAvgObsFakeQuantize(
            quant_min=0, quant_max=255, dtype=torch.uint8, averaging_constant=AVERAGING
        )
        return quantizer

    def ends(model: Net) -> list[float]:
        observers = [model.get_submodule(f"{name}.activation_post_process") for name in ("entry", "shared")]
        return [float(getattr(observer, end)) for end in ("min_val", "max_val") for observer in observers]

    model = net(make)
    alone = copy.deepcopy(model)
    inputs, targets = data(world.world_size)
    wrapped = DistributedDataParallel(model)
    found, expected = [], []
    for trained, called, per_step in (
        (model, wrapped, inputs[:, world.rank]),
        (alone, alone, inputs.flatten(1, 3)[:, None]),
    ):
        wanted = targets[:, world.rank] if trained is model else targets.flatten(1)[:, None]
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        for step in range(STEPS):
            for rows, classes in zip(per_step[step], wanted[step], strict=True):
                (F.cross_entropy(called(rows), classes) / len(per_step[step])).backward()
            optimizer.step()
            optimizer.zero_grad()
            (found if trained is model else expected).append(ends(trained))
    return {"ends": found, "alone": expected}


def initialised(world: World, method: str) -> dict[str, Any]:
    """Ranges that ptq finds in uneven parts of the rows and in all of them, and its collectives.

    Only the first range is compared bit by bit: the others depend on how the rows are batched.
    """
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(400, FEATURES, generator=generator)
    rows[311, 2] = 40.0
    cuts = [0, *(400 * (rank + 1) // (world.world_size + 1) + 7 * rank for rank in range(world.world_size - 1)), 400]
    settings = PTQConfig.model_validate({"ranges": method, **({"percentile": 99.9} if method == "percentile" else {})})
    two_bits = partial(ActivationFakeQuantize, quant_max=3)  # few enough that clipping pays
    together, single = net(two_bits), net(two_bits)
    with counted() as calls:
        initialise_ranges(together, _batches(rows[cuts[world.rank] : cuts[world.rank + 1]]), world, settings)
    initialise_ranges(single, _batches(rows), World(0, 0, 1, torch.device("cpu")), settings)
    return {"ends": _ends(together), "alone": _ends(single), "collectives": len(calls)}


def _batches(rows: Tensor) -> list[Batch]:
    return [Batch(torch.arange(len(part)), part, torch.zeros(len(part))) for part in rows.split(64)]


def everything(world: World) -> dict[str, Any]:
    """Calls all of the above in one start of the ranks."""
    return {
        "moving_average": ours(world, "moving_average"),
        "min_max": ours(world, "min_max"),
        "stock": stock(world),
        "ptq": {method: initialised(world, method) for method in ("min_max", "percentile", "mse")},
    }
