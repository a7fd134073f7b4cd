"""Base of metrics that are integers which ranks add up, and collections of them.

They do without torchmetrics, whose import takes as long as torch's own: it brings scipy.signal and matplotlib.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Counter(ABC):
    """A metric of integers that ranks add up; updates take outputs [B, classes, ...] and targets [B, ...]."""

    def __init__(self, num_classes: int, ignored: int | None = None) -> None:
        self._num_classes = num_classes
        self._ignored = ignored
        self._names: list[str] = []

    @abstractmethod
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Counts the samples of a batch."""

    @abstractmethod
    def compute(self) -> Tensor | dict[str, Tensor]:
        """Returns the result, or several by name."""

    def _count(self, name: str, *shape: int) -> None:
        self._names.append(name)
        setattr(self, name, torch.zeros(shape, dtype=torch.int64))

    @property
    def sums(self) -> dict[str, Tensor]:
        """The counts that are added up over ranks, int64, by the names of their attributes."""
        return {name: getattr(self, name) for name in self._names}

    def to(self, device: torch.device) -> None:
        for name, counts in self.sums.items():
            setattr(self, name, counts.to(device))

    def gather(self) -> None:
        """Takes over from the other ranks what is not added up. Collective."""
        return

    def _labels(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the classes of the targets and of the decisions, int64 [counted samples or pixels]."""
        decisions, targets = outputs.argmax(1).flatten(), targets.flatten().long()
        if self._ignored is None:
            return targets, decisions
        counted = targets != self._ignored
        return targets[counted], decisions[counted]


class Counts(Mapping[str, Any]):
    """Counters by name, as a `torchmetrics.MetricCollection` of them would be used."""

    def __init__(self, counters: Mapping[str, Counter]) -> None:
        self._counters = dict(counters)
        self._others: dict[str, Any] = {}

    def add_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Adds metrics of another kind, such as torchmetrics': they have to, update and compute, and sum over ranks."""
        self._others |= metrics

    def __getitem__(self, name: str) -> Any:
        return (self._counters | self._others)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counters | self._others)

    def __len__(self) -> int:
        return len(self._counters | self._others)

    def to(self, device: torch.device) -> Counts:
        for metric in self.values():
            metric.to(device)
        return self

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        for metric in self.values():
            metric.update(outputs, targets)

    def compute(self) -> dict[str, Tensor]:
        """Returns the results over the samples of all ranks; the counters keep this rank's own. Collective."""
        counters = {name: copy.copy(counter) for name, counter in self._counters.items()}
        if counters and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            _over_ranks(list(counters.values()))
        results: dict[str, Tensor] = {}
        for name, counter in counters.items():
            found = counter.compute()
            results |= {name: found} if isinstance(found, Tensor) else found
        return results | {name: metric.compute() for name, metric in self._others.items()}


def _over_ranks(counters: Sequence[Counter]) -> None:
    """Gives each counter the counts of all ranks, in one sum."""
    states = [(counter, name, counts) for counter in counters for name, counts in counter.sums.items()]
    total = torch.cat([counts.flatten() for _, _, counts in states])
    dist.all_reduce(total)
    parts = total.split([counts.numel() for _, _, counts in states])
    for (counter, name, counts), part in zip(states, parts, strict=True):
        setattr(counter, name, part.view(counts.shape))
    for counter in counters:
        counter.gather()


def gathered(tensor: Tensor) -> list[Tensor]:
    """Returns the tensors of all ranks, which have the same shape."""
    ranks = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, tensor.contiguous())
    return ranks


def count_at(counts: Tensor, places: Tensor) -> None:
    """Adds 1 to `counts`, int64 of any shape, at each flat index in `places`."""
    places = places.flatten()
    counts.view(-1).index_add_(0, places, torch.ones_like(places))


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Divides integers as float32; 0 where `whole` is 0."""
    return part.float() / whole.float().masked_fill(whole == 0, 1)
