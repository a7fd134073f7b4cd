"""Decides whether a run reads packed images, and packs them on each node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dist_train.config.data import DataConfig
from dist_train.distributed.world import World
from dist_train.errors import Preempted

OFF = "off"
_SECONDS = 7 * 24 * 3600.0  # in which a node's first rank packs its images, at most


def settle_pack(data: DataConfig, world: World, recorded: int | str | None, packs: bool) -> DataConfig:
    """Returns the section with `args.pack` settled: a size, or "off". Collective.

    auto is decided at a run's first start, by whether all nodes have a pack of the files, and kept: packed images
    give other crops, and so other results.

    Args:
        recorded: the size or "off" that the run began with; None for a new run.
        packs: True where images are packed that are not yet; False to read the files instead.
    """
    if data.name != "image_folder":
        return data
    from dist_train.data.datasets.args import read_args
    from dist_train.data.datasets.image_folder import ImageFolderArgs
    from dist_train.data.datasets.image_packs import has_packs

    args = read_args(data, ImageFolderArgs)
    settled: int | str = args.pack if args.pack != "auto" or recorded is None else recorded
    if settled == "auto" or (not packs and settled != OFF):
        there = world.first_on_node(lambda: has_packs(data), "looking for packed images")
        settled = args.kind.size if all(world.gather(there)) else OFF
    return data.model_copy(update={"args": data.args | {"pack": settled}})


def settled_pack(data: DataConfig) -> int | str | None:
    """Returns what `settle_pack` came to; None for a dataset that cannot be packed."""
    settled: Any = data.args.get("pack") if data.name == "image_folder" else None
    return settled if isinstance(settled, (int, str)) else None


def pack_on_nodes(data: DataConfig, world: World, threads: int, say: Callable[[str], None]) -> None:
    """Packs the images that are not packed yet, where `settle_pack` came to a size: once on each node. Collective.

    Raises:
        Preempted: on every rank, where one was asked to stop; what is packed stays.
    """
    if not isinstance(settled_pack(data), int):
        return
    from dist_train.data.datasets.image_packs import pack_images

    done = world.first_on_node(
        lambda: pack_images(data, threads, say, lambda: world.stop.requested, show=world.is_main),
        "packing the images",
        max(_SECONDS, world.timeout),
    )
    if not all(world.gather(done)):
        raise Preempted("stopped while the images were packed; those that are packed stay")
