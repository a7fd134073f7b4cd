"""Arguments of the built-in datasets."""

from __future__ import annotations

from dist_train.config.data import DataConfig
from dist_train.data.datasets.args import NoArgs, read_args
from dist_train.data.datasets.fake import FakeArgs
from dist_train.hub import PREFIX
from dist_train.registry import resolve

ARGS = {
    **dict.fromkeys(("digits", "mnist", "fashion_mnist", "cifar10", "cifar100"), NoArgs),
    "fake": FakeArgs,
    # Files that import torchvision.
    "coco": "dist_train.data.datasets.coco:CocoArgs",
    "image_folder": "dist_train.data.datasets.image_folder:ImageFolderArgs",
    "shapes": "dist_train.data.datasets.shapes:ShapesArgs",
    "languages": "dist_train.data.datasets.languages:LanguagesArgs",
    PREFIX: "dist_train.data.datasets.huggingface:HuggingFaceArgs",
}
"""The arguments of each built-in dataset, or "module:attr"; those of all `hf/...` under their prefix."""


def check_args(data: DataConfig) -> None:
    """Checks data.args of a built-in dataset without loading it; raises ConfigError with each mistake."""
    name = PREFIX if data.name.startswith(PREFIX) else data.name
    if name in ARGS:
        read_args(data, resolve(ARGS[name]))
