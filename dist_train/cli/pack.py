"""`dist-train pack`: packs the images of a configuration, before a run reads them."""

from __future__ import annotations

import os

import click

from dist_train.cli.verbs import ConfigVerb
from dist_train.errors import EXIT_DONE, ConfigError, Problem, printable


@click.command(cls=ConfigVerb)
def pack(config: str, settings: tuple[str, ...]) -> int:
    """Packs the decoded images of an image_folder on this node, for all epochs and runs.

    Packs with a shorter edge of data.args.pack pixels, where that is auto or off of data.args.resize. Goes on where an
    earlier call was stopped, and packs changed files again. With several nodes, once on each.
    """
    from dist_train.config.load import load

    loaded = load(config, settings)
    data = loaded.config.data
    if data.name != "image_folder":
        message = f"the images of {data.name} cannot be packed; its arrays are memory-mapped already"
        raise ConfigError([Problem("data.name", message, hint="--data.name image_folder --data.root FOLDER")])
    import torch

    from dist_train.data.datasets.image_packs import pack_images

    torch.set_num_threads(1)  # one core for each of the decoders
    pack_images(data, len(os.sched_getaffinity(0)), lambda text: print(printable(text), flush=True), lambda: False)
    return EXIT_DONE
