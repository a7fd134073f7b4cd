"""Arguments of the built-in datasets."""

from __future__ import annotations

from pydantic import BaseModel

from dist_train.config.data import DataConfig
from dist_train.data.datasets.args import NoArgs, read_args
from dist_train.data.datasets.fake import FakeArgs
from dist_train.data.datasets.image_folder import ImageFolderArgs

ARGS: dict[str, type[BaseModel]] = {
    **dict.fromkeys(("digits", "mnist", "fashion_mnist", "cifar10", "cifar100"), NoArgs),
    "fake": FakeArgs,
    "image_folder": ImageFolderArgs,
}
"""The arguments of each built-in dataset."""


def check_args(data: DataConfig) -> None:
    """Checks data.args of a built-in dataset without loading it; raises ConfigError with each mistake."""
    if data.name in ARGS:
        read_args(data, ARGS[data.name])
