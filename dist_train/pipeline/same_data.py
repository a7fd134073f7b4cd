"""Checks that all ranks see the same data."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset

from dist_train import registry
from dist_train.config.data import DataConfig
from dist_train.data.arrays import ImageArrays
from dist_train.data.content import Content, is_random, read_content, tensors_digest
from dist_train.data.items import name_of, rows_in
from dist_train.data.splits import Splits
from dist_train.distributed.world import World
from dist_train.errors import DataError
from dist_train.trees import leaves

SPLITS = {"train": "training", "eval": "evaluation"}
_CLASSES = "classes"
_LONG = 80  # characters of a value that is shown
EXAMPLE_ROWS = 2
"""Rows on which a model is tried."""
SHOWN = 3  # groups of ranks, differences, hosts and ids that a message shows


def require_same_on_all_ranks(
    data: DataConfig, splits: Splits, seed: int, world: World, warn: Callable[[str], None]
) -> dict[str, Content]:
    """Compares what the ranks know of the data, then items of it. Collective.

    Returns:
        the content of each split, the same on all ranks.

    Raises:
        DataError: on every rank, where they differ.
    """
    found = world.gather((socket.gethostname(), facts(splits)))
    hosts = [host for host, _ in found]
    differing = differences([each for _, each in found], hosts)
    if differing == [_CLASSES]:
        differing = differences(_first_difference(world.gather(splits.classes)), hosts)
    if differing:
        raise _differ("; ".join(differing), data)
    return {name: _same_items(data, splits, name, seed, world, hosts, warn) for name in SPLITS}


def facts(splits: Splits) -> dict[str, str]:
    """Returns what must be the same on all ranks, and costs nothing to know; first what tells most."""
    known: dict[str, Any] = {}
    for name, what in SPLITS.items():
        split = getattr(splits, name)
        streamed = isinstance(split, IterableDataset)
        known[f"{what} rows"] = "a stream" if streamed else f"{rows_in(split):,}"
        shape = split.images.shape[1:] if isinstance(split, ImageArrays) else getattr(split, "input_shape", None)
        known[f"{what} set"] = name_of(split) + ("" if shape is None else f" of {list(shape)}")
    for name, what in (
        ("steps_per_epoch", "steps of an epoch"),
        ("num_classes", "number of classes"),
        (_CLASSES, _CLASSES),
        ("num_outputs", "outputs"),
        ("mean", "mean"),
        ("std", "std"),
        ("resize", "resize"),
        ("dynamic", "dynamic dimensions"),
        ("fingerprint", "fingerprint"),
    ):
        known[what] = getattr(splits, name)
    return {what: _short(value) for what, value in known.items()}


def _short(value: Any) -> str:
    """Returns a value as text, or its begin with a hash of all of it."""
    text = (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)
    return text if len(text) <= _LONG else f"{text[: _LONG // 2]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def differences(per_rank: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """Returns sentences that say what differs over the ranks; [] where nothing does, ["classes"] for their names alone.

    A fingerprint differs with all else, so it is named only where nothing else differs.
    """
    differing = [what for what in per_rank[0] if len({each[what] for each in per_rank}) > 1]
    if len(differing) > 1:
        differing = [what for what in differing if what != "fingerprint"]
    if differing == [_CLASSES]:
        return differing
    return [f"{what}: {by_ranks([each[what] for each in per_rank], hosts)}" for what in differing[:SHOWN]]


def _first_difference(classes: Sequence[tuple[str, ...]]) -> list[dict[str, str]]:
    """Returns, for each rank, the first class that does not have the same name on all; all have as many."""
    place = next(place for place, names in enumerate(zip(*classes, strict=True)) if len(set(names)) > 1)
    return [{f"name of class {place}": _short(names[place])} for names in classes]


def by_ranks(values: Sequence[str], hosts: Sequence[str]) -> str:
    """Returns "10,000 on ranks 0-2 (node-a), 9,999 on rank 3 (node-b)": the value of most ranks first."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    largest = sorted(groups, key=lambda value: -len(groups[value]))
    said = [f"{value} on {ranks_in_words(groups[value], hosts)}" for value in largest[:SHOWN]]
    return ", ".join(said) + and_more(len(groups) - SHOWN, "value")


def ranks_in_words(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Returns "ranks 0-2, 5 (node-a)", however many there are."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    said = [str(first) if first == last else f"{first}-{last}" for first, last in spans[:SHOWN]]
    left = sum(last - first + 1 for first, last in spans[SHOWN:])
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    where = ", ".join(names[:SHOWN]) + and_more(len(names) - SHOWN, "host")
    return f"rank{'' if len(ranks) == 1 else 's'} {', '.join(said)}{and_more(left, 'rank')} ({where})"


def and_more(count: int, what: str) -> str:
    return f" and {count} more {what}{'' if count == 1 else 's'}" if count > 0 else ""


def _differ(message: str, data: DataConfig) -> DataError:
    hints = []
    if data.root is not None:
        hints.append(f"is data.root, {data.root}, the same on each node? share it, or copy it whole")
    entry = registry.datasets.entry(data.name)
    if not (isinstance(entry.target, str) and entry.target.startswith("dist_train.")):
        hints.append(
            "let the dataset give every rank the same items in the same order (sort what glob and listdir give; seed "
            "what is drawn): each rank is given its share of them later"
        )
    if data.split is not None and data.split.by != "row":
        column = "groups" if data.split.by == "group" else "targets"
        hints.append(f"data.split.by {data.split.by} divides by `{column}` of the dataset: give every rank the same")
    return DataError(
        f"the data {data.name} is not the same on all ranks: {message}",
        "; ".join(hints) or "empty data.cache_dir on the nodes that differ, so that they fetch the data again",
    )


def _same_items(
    data: DataConfig,
    splits: Splits,
    name: str,
    seed: int,
    world: World,
    hosts: Sequence[str],
    warn: Callable[[str], None],
) -> Content:
    """Compares items of a split over the ranks, and returns those that any of them has read. Collective."""
    split, what = getattr(splits, name), SPLITS[name]
    collate = splits.collate_of(split)
    own = read_content(split, seed, collate)
    all_ranks = world.gather(own)
    common = Content({index: seen for each in reversed(all_ranks) for index, seen in each.items.items()})
    differing = sorted({index for each in all_ranks for index in each.differing(common)})
    if not differing:
        if rounded := [index for each in all_ranks for index in each.rounded(common)]:
            warn(f"{items_in_words(rounded)} of the {what} data differ by rounding between ranks")
        return common
    if any(world.gather(is_random(split, differing, collate))):
        say_random(what, warn)
        return Content({}, random=True)
    first = differing[0]
    shown = [each.items[first].shown if first in each.items else "not read" for each in all_ranks]
    if len(set(shown)) == 1:  # the values differ
        shown = [f"{text} (hash {each.items[first].digest[:8]})" for text, each in zip(shown, all_ranks, strict=True)]
    raise _differ(f"{items_in_words(differing)} of the {what} data: item {first} is {by_ranks(shown, hosts)}", data)


def take_one_example(splits: Splits, world: World) -> None:
    """Takes rank 0's example, where items are random by themselves, so that ranks have others. Collective."""
    example = splits.example(EXAMPLE_ROWS)
    if len(set(world.gather(tensors_digest(*leaves(example))))) > 1:
        splits.take_example(EXAMPLE_ROWS, world.gather(example if world.is_main else None)[0])


def items_in_words(ids: Sequence[int]) -> str:
    ids = sorted(set(ids))
    names = ", ".join(map(str, ids[:SHOWN])) + and_more(len(ids) - SHOWN, "item")
    return f"item{'' if len(ids) == 1 else 's'} {names}"


def say_random(what: str, warn: Callable[[str], None]) -> None:
    warn(
        f"an item of the {what} data is not the same when it is read twice, so that its content cannot be compared "
        "over ranks and starts; what draws from the global generators of torch, numpy and random would be"
    )
