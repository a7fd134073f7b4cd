"""Which samples a rank takes at which step: global batches of (seed, epoch) alone, shared without repeats."""

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
import torch.utils.data

from dist_train.data.permutation import Int64Array, Permutation, derive_key

# Samples whose places in the permutation are worked out at once when no global batch is given; bounds the memory, not
# the result.
_CHUNK = 1024


def shares(rows: int, world_size: int) -> list[int]:
    """How many rows of a global batch each rank takes, rank 0 first; they add up to `rows`.

    A rank takes no rows or at least two, because BatchNorm in train mode refuses one; only a global batch of a single
    row gives rank 0 just one. With fewer than two rows a rank, the first rows // 2 ranks take them all. Sizes of the
    ranks that take any differ by at most one, the larger first.

    Raises:
        ValueError: rows < 0 or world_size < 1.
    """
    if rows < 0 or world_size < 1:
        raise ValueError(f"cannot share {rows} rows over {world_size} ranks")
    takers = min(world_size, max(rows // 2, 1))
    size, larger = divmod(rows, takers)
    return [size + (rank < larger) if rank < takers else 0 for rank in range(world_size)]


def evaluation_slice(size: int, world_size: int, rank: int) -> range:
    """This rank's contiguous part of range(size), to evaluate: over all ranks each element once.

    Parts differ by at most one in size; there may be none for some ranks.

    Raises:
        ValueError: size < 0, or rank outside range(world_size).
    """
    if size < 0 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size} has no part of {size} samples")
    return range(rank * size // world_size, (rank + 1) * size // world_size)


@dataclass(frozen=True)
class RankSlice:
    """What one rank runs of one global batch.

    Attributes:
        ids: int64 [rows]; the rank's own rows. Over all ranks, in rank order, they are the global batch.
        filler: int64 [max(0, 2 - rows)]; copies of rows of the global batch, to be run at weight 0 so that the rank has
            at least two rows.
        global_count: rows of the global batch.
        pieces: rows of the micro-batches that were asked for, in order; else all rows in one piece. They add up to `rows`.
        predecessors: int64 [pieces]; the row before each piece's first one in the global batch, in which the last is before the first.
    """

    ids: Int64Array
    filler: Int64Array
    global_count: int
    pieces: tuple[int, ...]
    predecessors: Int64Array


class ElasticDistributedSampler(torch.utils.data.DistributedSampler[int]):
    """A `torch.utils.data.DistributedSampler` whose global batches do not depend on the number of ranks.

    Without `global_batch_size` it keeps that class's promises (lengths, padding or dropping, rank r takes every
    num_replicas-th sample, `set_epoch`). The order is another one: a keyed permutation that is evaluated
    as far as it is iterated, so that nothing of the dataset's size is allocated.

    With it, step k of an epoch takes the same samples at any world size, and any step is reached in
    O(global_batch_size). `rank_slice(step)` is this rank's share of a step; iteration yields the samples of these
    shares from `start_step` on. Shares are uneven rather than padded, see `shares`. A run that was interrupted
    continues with `start_step`, on as many ranks as there are then. `start_step` holds for the epoch that is iterated
    first; `set_epoch` to another epoch after that sets it back to 0.

    Args:
        dataset: anything with a length.
        num_replicas, rank: default to those of the default process group.
        shuffle: whether samples are permuted; the permutation is a function of (seed, epoch, length).
        seed: any integer, the same on all ranks.
        drop_last: leave out the last, partial global batch; without `global_batch_size`, the samples that do not go
            round.
        global_batch_size: samples of one optimizer step, over all ranks.
        start_step: first step of the first epoch.
        micro_batch_size: cut every rank's share into as many pieces of at most about that many rows, so that ranks can synchronise
            within a micro-batch. The k-th pieces of all ranks together follow one another in the global batch, and are the same rows
            wherever num_replicas * micro_batch_size is. None: each rank's rows follow one another.

    Raises:
        ValueError: rank outside range(num_replicas), global_batch_size < 1, or a start_step that the epoch does not
            have.
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
    ) -> None:
        super().__init__(cast(torch.utils.data.Dataset[int], dataset), num_replicas, rank, shuffle, seed, drop_last)
        self._size = len(dataset)
        self.global_batch_size = global_batch_size
        self.start_step = start_step
        self._micro_batch_size = micro_batch_size
        self._iterated_epoch: int | None = None
        self._order: tuple[tuple[int, int, bool], Permutation | None] | None = None
        if global_batch_size is None:
            if start_step:
                raise ValueError("start_step counts global batches: give global_batch_size too")
            return
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size must be at least 1, not {global_batch_size}")
        if not 0 <= start_step <= self.num_steps:
            raise ValueError(f"start_step must lie in 0..{self.num_steps}, the steps of an epoch, not at {start_step}")

    @property
    def num_steps(self) -> int:
        """Global batches of an epoch; the last one is partial unless it was dropped."""
        batch = self._global_batch_size()
        return self._size // batch if self.drop_last else -(-self._size // batch)

    def global_batch(self, step: int) -> Int64Array:
        """Samples of the global batch of `step`: int64 [rows]; IndexError for a step outside range(num_steps)."""
        start, rows = self._extent(step)
        return self._at(np.arange(start, start + rows))

    def rank_slice(self, step: int) -> RankSlice:
        """This rank's part of the global batch of `step`; raises IndexError for a step outside range(num_steps)."""
        start, rows = self._extent(step)
        count = self._pieces(rows)
        edges = [rows * piece // count for piece in range(count + 1)]
        sizes = [shares(end - first, self.num_replicas) for first, end in pairwise(edges)]
        before = [first + sum(each[: self.rank]) for first, each in zip(edges, sizes, strict=False)]
        pieces = tuple(each[self.rank] for each in sizes)
        own = sum(pieces)
        copies = np.arange(max(0, 2 - own)) % rows
        places = [np.arange(first, first + size) for first, size in zip(before, pieces, strict=True)]
        taken = self._at(start + np.concatenate([*places, copies, (np.array(before) - 1) % rows]))
        return RankSlice(taken[:own], taken[own:-count], rows, pieces, taken[-count:])

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which the order is a function of; all ranks must set the same."""
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
            # What is beyond the end starts over, which is how DistributedSampler pads.
            yield from self._at((self.rank + turns * self.num_replicas) % self._size).tolist()

    def _global_batch_size(self) -> int:
        if self.global_batch_size is None:
            raise ValueError("steps need the global_batch_size of this sampler")
        return self.global_batch_size

    def _pieces(self, rows: int) -> int:
        """Pieces of a global batch of that many rows; each has at least two, unless there is but one."""
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
            key = derive_key("order", self.seed, self.epoch)
            self._order = identity, Permutation(self._size, key) if self.shuffle else None
        permutation = self._order[1]
        return positions if permutation is None else permutation(positions)
