"""Assigns samples to ranks and steps: global batches depend on (seed, epoch) alone and are shared without repeats."""

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch.utils.data

from dist_train.data.draw import Order, WeightedDraw
from dist_train.data.permutation import Int64Array, Permutation, derive_key

# Samples permuted at once, for several steps; bounds the memory, not the result.
_CHUNK = 1024


def shares(rows: int, world_size: int) -> list[int]:
    """Number of rows of a global batch that each rank takes, rank 0 first; they add up to `rows`.

    A rank takes no rows or at least two, because BatchNorm in train mode refuses a single one. Only a global batch of
    one row gives rank 0 just one. With fewer than two rows per rank, the first rows // 2 ranks take them all. The sizes
    of ranks that take rows differ by at most one, the larger first.

    Raises:
        ValueError: rows < 0 or world_size < 1.
    """
    if rows < 0 or world_size < 1:
        raise ValueError(f"cannot share {rows} rows over {world_size} ranks")
    takers = min(world_size, max(rows // 2, 1))
    size, larger = divmod(rows, takers)
    return [size + (rank < larger) if rank < takers else 0 for rank in range(world_size)]


def seed_of_stage(seed: int, stage: str) -> int:
    """Seed of the order and the augmentation of a stage of a run: each stage has others."""
    return derive_key("stage", seed, stage)


def evaluation_slice(size: int, world_size: int, rank: int) -> range:
    """This rank's contiguous part of range(size) for evaluation; over all ranks each element once.

    The parts' sizes differ by at most one, and may be 0.

    Raises:
        ValueError: size < 0, or rank outside range(world_size).
    """
    if size < 0 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} has no part of {size} samples")
    return range(rank * size // world_size, (rank + 1) * size // world_size)


@dataclass(frozen=True)
class RankSlice:
    """One rank's part of one global batch.

    Attributes:
        ids: int64 [rows]; the rank's own rows. In rank order, all ranks' ids are the global batch.
        filler: int64 [max(0, 2 - rows)]; copies of rows of the global batch, run at weight 0 so that the rank has two.
        global_count: rows of the global batch.
        pieces: rows of each micro-batch, in order; one piece where no micro_batch_size was given. Their sum is `rows`.
        predecessors: int64 [pieces]; the row before each piece's first row in the global batch, taken as a ring.
        turns: int64 [rows + filler + pieces]; numbers that tell apart the draws of one row within an epoch, so that
            each is augmented in its own way. None where a row comes once.
    """

    ids: Int64Array
    filler: Int64Array
    global_count: int
    pieces: tuple[int, ...]
    predecessors: Int64Array
    turns: Int64Array | None = None


class _Layout(NamedTuple):
    """A rank's places in a global batch: its own rows, the filler, the rows before each piece; and the pieces' rows."""

    places: Int64Array
    pieces: tuple[int, ...]


class ElasticDistributedSampler(torch.utils.data.DistributedSampler[int]):
    """A `torch.utils.data.DistributedSampler` whose global batches do not depend on the number of ranks.

    Without `global_batch_size` it keeps that class's promises: lengths, padding or dropping, `set_epoch`, and rank r
    takes every num_replicas-th sample. Only the order differs: a keyed permutation, evaluated as far as it is iterated,
    so memory does not grow with the dataset.

    With `global_batch_size`, step k of an epoch takes the same samples at any world size, and any step is reached in
    O(global_batch_size). `rank_slice(step)` is this rank's share of a step. Iteration yields the samples of these
    shares from `start_step` on. Shares are uneven rather than padded, see `shares`. An interrupted run continues with
    `start_step`, on any number of ranks. `start_step` holds for the first epoch that is iterated; `set_epoch` to
    another epoch resets it to 0.

    With `weights` it draws rows by weight, see `WeightedDraw`: one sequence of `samples` rows an epoch, a function of
    (weights, seed, epoch), which the ranks share as they share a permutation. So no rank draws for itself, no two ranks
    draw the same numbers, and another world size draws the same rows.

    Args:
        dataset: anything with a length.
        num_replicas, rank: default to the world size and rank of the default process group.
        shuffle: permutes the samples; the permutation is a function of (seed, epoch, length).
        seed: any integer, the same on all ranks.
        drop_last: drops the last, partial global batch; without `global_batch_size`, the samples that do not divide
            evenly.
        global_batch_size: samples of one optimizer step, over all ranks.
        start_step: first step of the first epoch.
        micro_batch_size: cuts every rank's share into equally many pieces of at most about that many rows, so that
            ranks can synchronise within a micro-batch. The k-th pieces of all ranks are contiguous in the global batch.
            They are the same rows wherever num_replicas * micro_batch_size is the same. None: each rank's rows are
            contiguous.
        weights: numbers [len(dataset)], the same on all ranks; None: each sample is taken once an epoch.
        replacement: draw by weight with replacement.
        samples: rows of an epoch that are drawn by weight; None: as many as `WeightedDraw` says.

    Raises:
        ValueError: rank outside range(num_replicas), global_batch_size < 1, start_step beyond the epoch, weights that
            are none or not as many as samples, or `samples` or shuffle=False that do not go with them.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        *,
        global_batch_size: int | None = None,
        start_step: int = 0,
        micro_batch_size: int | None = None,
        weights: npt.ArrayLike | None = None,
        replacement: bool = True,
        samples: int | None = None,
    ) -> None:
        super().__init__(cast(torch.utils.data.Dataset[int], dataset), num_replicas, rank, shuffle, seed, drop_last)
        self._draw = None if weights is None else WeightedDraw(weights, replacement, samples)
        self._size = len(dataset) if self._draw is None else self._draw.samples
        self._check_draw(len(dataset), samples)
        self.global_batch_size = global_batch_size
        self.start_step = start_step
        self._micro_batch_size = micro_batch_size
        self._iterated_epoch: int | None = None
        self._order: tuple[tuple[int, int, bool], Order | None] | None = None
        self._layouts: dict[int, _Layout] = {}
        self._window: tuple[tuple[int, int, bool], int, Int64Array] | None = None
        if global_batch_size is None:
            if start_step:
                raise ValueError("start_step counts global batches: give global_batch_size too")
            return
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size must be at least 1, not {global_batch_size}")
        if not 0 <= start_step <= self.num_steps:
            raise ValueError(f"start_step must lie in 0..{self.num_steps}, the steps of an epoch, not at {start_step}")

    def _check_draw(self, rows: int, samples: int | None) -> None:
        """Checks the settings of a draw by weight, and sets its lengths for one without global batches."""
        if self._draw is None:
            if samples is not None:
                raise ValueError("samples is the number of rows that are drawn by weight: give weights too")
            return
        if self._draw.rows != rows:
            raise ValueError(f"there are {self._draw.rows} weights for {rows} samples")
        if not self.shuffle:
            raise ValueError("rows are drawn by weight, so that shuffle=False cannot keep their order")
        evenly = self._size % self.num_replicas == 0
        self.num_samples = self._size // self.num_replicas + (not evenly and not self.drop_last)
        self.total_size = self.num_samples * self.num_replicas

    @property
    def num_steps(self) -> int:
        """Global batches of an epoch; the last may be partial unless it is dropped."""
        batch = self._global_batch_size()
        return self._size // batch if self.drop_last else -(-self._size // batch)

    @property
    def epoch_size(self) -> int:
        """Samples of an epoch's global batches, over all ranks."""
        return min(self._size, self.num_steps * self._global_batch_size())

    def global_batch(self, step: int) -> Int64Array:
        """Samples of the global batch of `step`: int64 [rows]; IndexError for a step outside range(num_steps)."""
        start, rows = self._extent(step)
        return self._at(np.arange(start, start + rows))

    def rank_slice(self, step: int) -> RankSlice:
        """This rank's part of the global batch of `step`; raises IndexError for a step outside range(num_steps)."""
        start, rows = self._extent(step)
        layout = self._layout(rows)
        taken = (
            self._at_step(step, layout.places) if rows == self.global_batch_size else self._at(start + layout.places)
        )
        own, count = sum(layout.pieces), len(layout.pieces)
        repeats = self._draw is not None and self._draw.replacement
        turns = start + layout.places if repeats else None
        return RankSlice(taken[:own], taken[own:-count], rows, layout.pieces, taken[-count:], turns)

    def _layout(self, rows: int) -> _Layout:
        """Returns this rank's places in a global batch of so many rows."""
        if rows not in self._layouts:
            count = self._pieces(rows)
            edges = [rows * piece // count for piece in range(count + 1)]
            sizes = [shares(end - first, self.num_replicas) for first, end in pairwise(edges)]
            before = [first + sum(each[: self.rank]) for first, each in zip(edges, sizes, strict=False)]
            pieces = tuple(each[self.rank] for each in sizes)
            copies = np.arange(max(0, 2 - sum(pieces))) % rows
            own = [np.arange(first, first + size) for first, size in zip(before, pieces, strict=True)]
            self._layouts[rows] = _Layout(np.concatenate([*own, copies, (np.array(before) - 1) % rows]), pieces)
        return self._layouts[rows]

    def _at_step(self, step: int, places: Int64Array) -> Int64Array:
        """Samples at these places of a full global batch. Steps are permuted several at once, as each call costs."""
        identity = (self.seed, self.epoch, self.shuffle)
        if (
            self._window is None
            or self._window[0] != identity
            or not 0 <= step - self._window[1] < len(self._window[2])
        ):
            batch = self._global_batch_size()
            steps = np.arange(step, min(self._size // batch, step + max(1, _CHUNK // len(places))))
            self._window = identity, step, self._at(steps[:, None] * batch + places)
        return self._window[2][step - self._window[1]]

    def share_as(self, num_replicas: int, rank: int) -> None:
        """Takes the shares of that rank of so many from now on; global batches stay what they were.

        Raises:
            ValueError: rank outside range(num_replicas), or a sampler without global batches.
        """
        self._global_batch_size()
        if not 0 <= rank < num_replicas:
            raise ValueError(f"there is no rank {rank} of {num_replicas}")
        self.num_replicas, self.rank = num_replicas, rank
        self._layouts, self._window = {}, None

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, of which the order is a function; the same on all ranks."""
        super().set_epoch(epoch)
        if self._iterated_epoch not in (None, epoch):
            self.start_step = 0

    def __iter__(self) -> Iterator[int]:
        self._iterated_epoch = self.epoch
        return self._by_replica() if self.global_batch_size is None else self._by_step(self.start_step)

    def __len__(self) -> int:
        """Samples that iteration yields on this rank."""
        if self.global_batch_size is None:
            return self.num_samples
        whole, rest = divmod(self._size, self.global_batch_size)
        length = max(0, whole - self.start_step) * shares(self.global_batch_size, self.num_replicas)[self.rank]
        if rest and not self.drop_last and self.start_step <= whole:
            length += shares(rest, self.num_replicas)[self.rank]
        return length

    def _by_step(self, start_step: int) -> Iterator[int]:
        for step in range(start_step, self.num_steps):
            yield from self.rank_slice(step).ids.tolist()

    def _by_replica(self) -> Iterator[int]:
        for start in range(0, self.num_samples, _CHUNK):
            turns = np.arange(start, min(start + _CHUNK, self.num_samples))
            # Positions beyond the end start over, as DistributedSampler pads.
            yield from self._at((self.rank + turns * self.num_replicas) % self._size).tolist()

    def _global_batch_size(self) -> int:
        if self.global_batch_size is None:
            raise ValueError("this sampler has no steps: give it a global_batch_size")
        return self.global_batch_size

    def _pieces(self, rows: int) -> int:
        """Number of pieces of a global batch; each has at least two rows, unless there is only one piece."""
        if self._micro_batch_size is None:
            return 1
        return min(-(-rows // (self.num_replicas * self._micro_batch_size)), max(1, rows // 2))

    def _extent(self, step: int) -> tuple[int, int]:
        """First position and number of rows of a global batch."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside the {self.num_steps} steps of an epoch")
        start = step * self._global_batch_size()
        return start, min(self._global_batch_size(), self._size - start)

    def _at(self, positions: Int64Array) -> Int64Array:
        """Samples at these positions of the epoch's order."""
        identity = (self.seed, self.epoch, self.shuffle)
        if self._order is None or self._order[0] != identity:
            self._order = identity, self._order_of_epoch()
        order = self._order[1]
        return positions if order is None else order(positions)

    def _order_of_epoch(self) -> Order | None:
        if self._draw is not None:
            return self._draw.order(derive_key("draw", self.seed, self.epoch))
        return Permutation(self._size, derive_key("order", self.seed, self.epoch)) if self.shuffle else None
