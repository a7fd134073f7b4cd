"""Loads one rank's batches: its share of each global batch, in micro-batches, and its part of the evaluation set."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice

import numpy as np
import torch

from dist_train.data.arrays import Batch
from dist_train.data.augment.mix import Mix, NoMix
from dist_train.data.permutation import Permutation, derive_key
from dist_train.data.rows import Source as Source
from dist_train.data.sampler import ElasticDistributedSampler, RankSlice, evaluation_slice
from dist_train.data.seeding import seed_everything as seed_everything
from dist_train.trees import Tree, map_leaves, rows_of, shapes_of, take


@dataclass(frozen=True)
class MicroBatch:
    """Inputs and targets of one forward pass: trees of tensors.

    Attributes:
        inputs: [B, ...] on the device; the first `rows` are real, the rest run at weight 0.
        targets: [rows, ...].
        rows: number of real inputs.
        partner_targets: [rows, ...], targets of the rows that mixup or cutmix mixed in; None without mixing.
        weight: share of a row's own pixels, and of its own target's loss; 1 without mixing.
        spare: True for a pass that only keeps the other ranks company: it has no real inputs and may change nothing.
    """

    inputs: Tree
    targets: Tree
    rows: int
    partner_targets: Tree | None = None
    weight: float = 1.0
    spare: bool = False


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of an optimizer step.

    Attributes:
        ids: the real samples, read from the dataset together with the tensors.
        micro_batches: at least one, each with at least two inputs.
        global_count: samples of all ranks, including those left out.
        left_out: ids of this rank's samples that could not be decoded.
    """

    ids: list[int]
    micro_batches: list[MicroBatch]
    global_count: int
    left_out: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.ids)


class TrainLoader:
    """Yields this rank's share of each global batch.

    Args:
        mix: mixes each row with its partner, the row before it in the global batch (the first row's is the last one).
            The global batch is shuffled, so this is as random as any other choice of partners, and a rank fetches only
            one more row. A row whose partner was left out stays as it is.
        alike: give every rank as many micro-batches, for ranks that communicate in each of them.
    """

    def __init__(
        self,
        source: Source,
        sampler: ElasticDistributedSampler,
        micro_batch_size: int | None,
        mix: Mix | NoMix | None = None,
        alike: bool = False,
    ) -> None:
        self._source = source
        self._alike = alike
        self._sampler = sampler
        self._micro_batch_size = micro_batch_size
        self._mix = mix or NoMix()

    @property
    def steps_per_epoch(self) -> int:
        return self._sampler.num_steps

    @property
    def samples_per_epoch(self) -> int:
        """Rows of an epoch, over all ranks; without those of a last batch that is dropped."""
        return self._sampler.epoch_size

    @property
    def may_leave_out(self) -> bool:
        """True where a step may consume fewer samples than planned."""
        return self._source.skips_corrupt

    def full_passes(self, example: Tree) -> list[Tree]:
        """Returns inputs in the shapes and memory format of a full step's forward passes, one of each shape.

        example: inputs [B, ...] of the model's shapes, on the device.
        """
        piece = self._sampler.rank_slice(0)
        own = len(piece.ids)

        def expanded(leaf: torch.Tensor) -> torch.Tensor:
            rows = leaf[:1].expand(own + len(piece.filler), *leaf.shape[1:])
            arranged: torch.Tensor = self._source.arranged(rows)
            return arranged.contiguous()

        whole = MicroBatch(map_leaves(expanded, example), torch.zeros(own), own)
        cut = self._cut(whole, piece.pieces, piece.global_count)
        return list({shapes_of(micro.inputs): micro.inputs for micro in cut}.values())

    def share_as(self, ranks: int, rank: int) -> None:
        """Takes the shares of that rank of so many, for the epochs that are begun from now on."""
        self._sampler.share_as(ranks, rank)

    def epoch(self, epoch: int, first_step: int, last_step: int) -> Iterator[StepBatch]:
        """Yields the steps first_step .. last_step - 1 of an epoch."""
        self._sampler.set_epoch(epoch)
        planned: deque[tuple[int, RankSlice]] = deque()  # worker processes fetch ahead of what is yielded

        def rows() -> Iterator[np.ndarray]:
            for step in range(first_step, last_step):
                piece = self._sampler.rank_slice(step)
                planned.append((step, piece))
                asked = np.concatenate([piece.ids, piece.filler, piece.predecessors])
                if piece.turns is not None:
                    asked = asked + piece.turns * len(self._source)
                yield asked if self._mix.extra_rows else asked[: -len(piece.predecessors)]

        for batch in self._source.batches(rows(), epoch):
            step, piece = planned.popleft()
            yield self._share(batch, piece, epoch, step)

    def _share(self, batch: Batch, piece: RankSlice, epoch: int, step: int) -> StepBatch:
        if batch.missing or self._mix.extra_rows:
            return self._rearranged(batch, piece, epoch, step)
        own = len(piece.ids)
        whole = MicroBatch(batch.inputs, take(batch.targets, slice(own)), own)
        return StepBatch(
            batch.ids[:own].tolist(), self._cut(whole, piece.pieces, piece.global_count), piece.global_count
        )

    def _rearranged(self, batch: Batch, piece: RankSlice, epoch: int, step: int) -> StepBatch:
        """Builds the share from the rows that were decoded: enough copies, and partners mixed in."""
        own, asked = len(piece.ids), len(batch.ids) + len(batch.missing)
        there = [place for place in range(asked) if place not in batch.missing]
        row_at = {place: row for row, place in enumerate(there)}
        real = [row_at[place] for place in there if place < own]
        # At least two rows: the sampler's filler, else copies of decoded rows.
        given = [row_at[place] for place in there if own <= place < own + len(piece.filler)]
        spare = islice(cycle(given or real or row_at.values()), max(0, 2 - len(real)))
        inputs = _taken(batch.inputs, [*real, *spare]) if there else self._source.copies(2)
        targets, partner_targets, weight = _taken(batch.targets, real), None, 1.0
        if real and self._mix.extra_rows:
            before = _places_before(piece.pieces, asked)
            partners = [row_at.get(before[place], row_at[place]) for place in there if place < own]
            mixed = self._mix(take(inputs, slice(len(real))), _taken(batch.inputs, partners), targets, epoch, step)
            if mixed is not None:
                rows, weight = mixed
                inputs, partner_targets = torch.cat([rows, inputs[len(real) :]]), _taken(batch.targets, partners)
        whole = MicroBatch(self._source.arranged(inputs), targets, len(real), partner_targets, weight)
        left_out = tuple(self._source.ids_of(piece.ids)[[place for place in batch.missing if place < own]].tolist())
        ends = accumulate(piece.pieces)
        kept = tuple(
            sum(end - size <= place < end for place in there) for end, size in zip(ends, piece.pieces, strict=True)
        )
        cut = self._cut(whole, kept, piece.global_count)
        return StepBatch(_taken(batch.ids, real).tolist(), cut, piece.global_count, left_out)

    def _cut(self, whole: MicroBatch, given: Sequence[int], planned: int) -> list[MicroBatch]:
        """Cuts a share into micro-batches.

        Args:
            given: the rows of each, where the sampler made several.
            planned: number of samples planned for all ranks.
        """
        if len(given) > 1:
            return self._given_pieces(whole, given)
        total = rows_of(whole.inputs)
        pieces, cut = self._pieces(total), []
        for piece in range(pieces):
            start, end = total * piece // pieces, total * (piece + 1) // pieces
            real = slice(start, start + max(0, min(end, whole.rows) - start))
            partners = None if whole.partner_targets is None else take(whole.partner_targets, real)
            inputs, targets = take(whole.inputs, slice(start, end)), take(whole.targets, real)
            cut.append(MicroBatch(inputs, targets, real.stop - start, partners, whole.weight))
        return [*self._spare(whole, len(cut), planned), *cut] if self._alike else cut

    def _pieces(self, rows: int) -> int:
        """Cut evenly: with micro-batches of at least two rows no piece has a single one."""
        pieces = max(1, -(-rows // self._micro_batch_size)) if self._micro_batch_size else 1
        return min(pieces, max(1, rows // 2))

    def _spare(self, whole: MicroBatch, own: int, planned: int) -> list[MicroBatch]:
        """Returns passes for a rank that cuts fewer micro-batches than another."""
        most = self._pieces(max(2, -(-planned // self._sampler.num_replicas)))
        inputs, targets = take(whole.inputs, slice(2)), take(whole.targets, slice(0))
        return [MicroBatch(inputs, targets, 0, spare=True)] * (most - own)

    def _given_pieces(self, whole: MicroBatch, rows: Sequence[int]) -> list[MicroBatch]:
        cut, start = [], 0
        for size in rows:
            real = slice(start, start + size)
            # A piece of fewer than two rows is filled with copies, like a whole share.
            inputs = take(whole.inputs, real)
            if size < 2:
                copies = take(whole.inputs, slice(2 - size))
                inputs = self._source.arranged(map_leaves(lambda *parts: torch.cat(parts), inputs, copies))
            partners = None if whole.partner_targets is None else take(whole.partner_targets, real)
            cut.append(MicroBatch(inputs, take(whole.targets, real), size, partners, whole.weight))
            start += size
        return cut


def _places_before(pieces: Sequence[int], asked: int) -> list[int]:
    """For each row of a share: index, among the requested rows, of the row before it in the global batch.

    The predecessors of the pieces' first rows are the last requested rows.
    """
    before: list[int] = []
    for number, size in enumerate(pieces):
        first = len(before)
        before += [asked - len(pieces) + number, *range(first, first + size - 1)][:size]
    return before


def _taken(tree: Tree, rows: list[int]) -> Tree:
    """Selects rows; a view where they are the first ones."""
    if rows == list(range(len(rows))):
        return take(tree, slice(len(rows)))

    def selected(leaf: torch.Tensor) -> torch.Tensor:
        return leaf.index_select(0, torch.tensor(rows, dtype=torch.int64, device=leaf.device))

    return map_leaves(selected, tree)


class EstimationLoader:
    """Batches of training samples for statistics, without augmentation: the same batches at any world size.

    Rank r has every world_size-th batch. The samples are drawn by `seed`; from a stream, the first ones are taken. A
    batch has at least two rows, if there are two samples.
    """

    def __init__(
        self,
        source: Source,
        samples: int,
        batch_size: int,
        seed: int,
        world_size: int,
        rank: int,
        *,
        shuffle: bool = True,
    ) -> None:
        self._source = source
        self._samples = min(samples, len(source))
        self._batches = min(-(-self._samples // batch_size), max(1, self._samples // 2))
        self._own = range(rank, self._batches, world_size)
        self._order = Permutation(len(source), derive_key("estimation", seed)) if shuffle else None

    def __iter__(self) -> Iterator[Batch]:
        def rows(number: int) -> np.ndarray:
            places = np.arange(self._samples * number // self._batches, self._samples * (number + 1) // self._batches)
            return places if self._order is None else self._order(places)

        return (batch for batch in self._source.batches(map(rows, self._own), None) if len(batch.ids))


class EvaluationLoader:
    """Yields this rank's contiguous, uneven part of a dataset: each sample once, unless it cannot be decoded."""

    def __init__(self, source: Source, batch_size: int, world_size: int, rank: int, limit: int | None = None) -> None:
        self._source = source
        self._batch_size = batch_size
        self.total = len(source) if limit is None else min(limit, len(source))
        """Samples of all ranks."""
        self._range = evaluation_slice(self.total, world_size, rank)

    def __iter__(self) -> Iterator[Batch]:
        starts = range(self._range.start, self._range.stop, self._batch_size)
        batches = self._source.batches(
            (np.arange(start, min(start + self._batch_size, self._range.stop)) for start in starts), None
        )
        return (batch for batch in batches if len(batch.ids))
