"""Packs the images of `image_folder` on this node, and looks for such packs."""

from __future__ import annotations

from collections.abc import Callable

from dist_train.config.data import DataConfig
from dist_train.console.counter import Counter
from dist_train.data.datasets.args import cache_folder, read_args
from dist_train.data.datasets.image_folder import ImageFolderArgs, file_table, list_files, split_folders
from dist_train.data.packs.index import index_file, pack_folder
from dist_train.data.packs.read import open_pack
from dist_train.data.packs.write import Job, in_bytes, told, write_pack
from dist_train.errors import ConfigError, Problem


def pack_images(
    data: DataConfig, threads: int, say: Callable[[str], None], stop: Callable[[], bool], show: bool = True
) -> bool:
    """Packs the images of both splits that are not packed yet; returns false where it was asked to stop.

    Args:
        threads: decoders side by side.
        show: True to print the progress.

    Raises:
        DataError: an image cannot be read, or there is no room.
    """
    args, cache = read_args(data, ImageFolderArgs), cache_folder(data)
    if data.root is None:
        raise ConfigError([Problem("data.root", "image_folder needs it", hint="--data.root FOLDER")])
    found = list_files(data)
    for name, images in split_folders(data).items():
        table = file_table(images, found[name])
        folder = pack_folder(cache, table.folder, args.kind)
        counter = Counter(f"packing {name}", "images", show)
        try:
            job = Job(table, folder, args.kind, args.max_pixels, threads)
            packed = write_pack(job, counter.begin, counter.count, stop)
        finally:
            counter.end()
        if packed.stopped:
            return False
        what = f"{len(table):,} images ({args.kind}), {in_bytes(packed.bytes)}, in {folder}"
        say(f"pack of {name}: {what}" + (f"; {packed.now:,} packed now" if packed.now else ""))
        for line in told(packed):
            say(f"pack of {name}: {line}")
    return True


def has_packs(data: DataConfig) -> bool:
    """Tells whether the packs of both splits are on this node, and of the files as they are now."""
    args, cache = read_args(data, ImageFolderArgs), cache_folder(data)
    if data.root is None:
        return False
    places = split_folders(data)
    if not all(index_file(pack_folder(cache, folder, args.kind)).exists() for folder in places.values()):
        return False  # without listing the files, of which there may be millions
    found = list_files(data)
    return all(open_pack(cache, file_table(folder, found[name]), args.kind) for name, folder in places.items())
