"""Checks that a resumed run sees the data that it began with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_train.config.data import DataConfig
from dist_train.data.content import Content, OfFiles, is_random
from dist_train.data.file_record import Compared, compare, read_record, write_record
from dist_train.data.splits import Splits
from dist_train.distributed.world import World
from dist_train.errors import DataError, escaped
from dist_train.pipeline.same_data import SHOWN, SPLITS, and_more, items_in_words, say_random
from dist_train.run_dir.retry import told
from dist_train.stages.data import RunData

_RESTORE = "restore the same data, or start a new run with another --run.dir"


def require_same_content(data: RunData, recorded: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """Compares `data.content` with what the run began with, which takes its place. Collective.

    recorded: state of the content by split, as a checkpoint holds it; {} where that is not known.

    Raises:
        DataError: on every rank, where the content is another.
    """
    now = data.content
    before = {name: Content.from_state(state) for name, state in recorded.items()}
    for name in before:
        what, differing = SPLITS[name], now[name].differing(before[name])
        if not differing:
            if rounded := now[name].rounded(before[name]):
                warn(f"{items_in_words(rounded)} of the {what} data differ by rounding from what this run began with")
            continue
        split = getattr(data.splits, name)
        if any(data.world.gather(is_random(split, differing, data.splits.collate_of(split)))):
            say_random(what, warn)
            before[name] = Content({}, random=True)
            continue
        first = differing[0]
        pair = before[name].items[first], now[name].items[first]
        was, is_now = (seen.shown for seen in pair)
        if was == is_now:
            was, is_now = (f"{seen.shown} (hash {seen.digest[:8]})" for seen in pair)
        raise DataError(
            f"the dataset {data.config.data.name} has changed since this run began: {items_in_words(differing)} of the "
            f"{what} data: item {first} was {was} and is {is_now}",
            _RESTORE,
        )
    data.content = {**now, **before}


def compare_files(
    data: DataConfig, splits: Splits, record: Path, world: World, new: bool, warn: Callable[[str], None]
) -> None:
    """Compares the files of a dataset with their record in the run directory, which a new run writes. Collective.

    Rank 0 does it; the other ranks' data has the same names and sizes.

    Raises:
        DataError: a file has other content; the other ranks raise PeerError.
    """
    of_files = {name: split for name in SPLITS if isinstance(split := getattr(splits, name), OfFiles)}
    if of_files:
        world.on_rank_0(lambda: _compare_files(data, of_files, record, new, warn), "comparing the files of the data")


def _compare_files(
    data: DataConfig, splits: Mapping[str, OfFiles], record: Path, new: bool, warn: Callable[[str], None]
) -> None:
    known = None if new else read_record(record)
    if known is None:
        told(lambda: write_record(record, splits), record)
        return
    for name, split in splits.items():
        found = compare(known, name, split)
        if found is None:
            continue
        if found.changed:
            raise DataError(
                f"the dataset {data.name} has changed since this run began: other content of the same length in "
                f"{_files(split, found.changed)}",
                _RESTORE,
            )
        if found.touched:
            warn(
                f"{found.touched:,} files of the {SPLITS[name]} data have other times than when this run began, and "
                f"the same names and lengths: {_said(split, found)}"
            )


def _said(split: OfFiles, found: Compared) -> str:
    if not found.unknown:
        return "their content is the same"
    same = f"the content of {found.compared:,} files was compared, and is the same"
    return f"{same}; not compared: {_files(split, found.unknown)}"


def _files(split: OfFiles, ids: Sequence[int]) -> str:
    return ", ".join(escaped(str(split.path(index))) for index in ids[:SHOWN]) + and_more(len(ids) - SHOWN, "file")
