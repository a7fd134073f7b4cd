"""Checks of the section `data`: settings that contradict each other or this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from dist_train.addresses import mistaken_path
from dist_train.config.checks.base import Checks, about
from dist_train.config.data import (
    ColorJitter,
    RandAugment,
    RandomErasing,
    RandomHorizontalFlip,
    RandomResizedCrop,
    is_weights_file,
)
from dist_train.config.tree import Config
from dist_train.errors import Problem

DATA_CHECKS: Checks = []
_about = partial(about, DATA_CHECKS)
_BY_WORKERS = (RandomResizedCrop, RandAugment)
_WITH_BOXES = ("coco", "shapes")  # whose own steps are random_resized_crop and random_horizontal_flip


@_about("data.micro_batch_size", "data.global_batch_size")
def _micro_batch(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    micro, whole = config.data.micro_batch_size, config.data.global_batch_size
    if micro is not None and micro > whole:
        message = f"{micro} is larger than data.global_batch_size, {whole}, which is of all ranks together"
        yield Problem(
            "data.micro_batch_size", message, hint="lower it, or leave it out: a rank then takes its whole share"
        )


@_about("data.root")
def _root_exists(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    root = config.data.root
    if root is not None and not root.is_dir() and mistaken_path(root) is None:
        what = "is not a folder" if root.exists() else "does not exist"
        hint = "give the folder that holds the dataset's files"
        yield Problem("data.root", f"{root} {what}", hint=hint, here=True)


@_about("data.sampling")
def _sampling(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    sampling = config.data.sampling
    if sampling is None or not is_weights_file(sampling.weights):
        return
    key, path = "data.sampling.weights", Path(sampling.weights)
    if path.suffix not in (".npy", ".csv", ".txt"):
        yield Problem(
            key, f"{path} is no .npy, .csv or .txt file", hint="save one number a row: numpy.save(FILE, array)"
        )
    elif not path.is_file():
        yield Problem(key, f"the file {path} does not exist", hint="give a file with one number a row", here=True)


@_about("data.split")
def _split(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    split = config.data.split
    if split is None:
        return
    if (split.eval is None) == (split.folds is None):
        message = "needs a share to evaluate on, or a number of folds" if split.eval is None else "has both"
        yield Problem("data.split", message, hint="{eval: 0.1}, or {folds: 5, fold: 0}")
    if split.folds is not None and split.fold >= split.folds:
        message = f"there is no fold {split.fold} of {split.folds}"
        yield Problem("data.split.fold", message, hint=f"0 to {split.folds - 1}")
    if split.folds is None and split.fold:
        yield Problem("data.split.fold", "is ignored without folds", hint="remove it, or give data.split.folds")


@_about()
def _jitter_does_something(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    for item in config.data.augment:
        if isinstance(item, ColorJitter) and not (item.brightness or item.contrast or item.saturation):
            message = "color_jitter with brightness, contrast and saturation 0 does nothing"
            yield Problem("data.augment", message, hint="for example {name: color_jitter, brightness: 0.4}")


@_about("data.name")
def _augment_of_workers(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    """Checks that augmentation by the workers of image_folder comes before augmentation of whole batches."""
    first_batched = ""
    for place, item in enumerate(config.data.augment):
        if isinstance(item, _BY_WORKERS):
            key = f"data.augment.{place}"
            if config.data.name in _WITH_BOXES and isinstance(item, RandomResizedCrop):
                continue  # the dataset says where it may stand
            if config.data.name != "image_folder":
                message = f"{item.name} is applied by the workers of image_folder, and not for {config.data.name}"
                yield Problem(
                    key, message, hint="remove it, or use random_crop, random_horizontal_flip, random_erasing"
                )
            elif first_batched:
                message = f"{item.name} comes behind {first_batched}, which is applied to whole batches after decoding"
                hint = "the order is random_resized_crop, random_horizontal_flip, rand_augment, then the others"
                yield Problem(key, message, hint=hint)
            elif isinstance(item, RandomResizedCrop) and place:
                yield Problem(key, "random_resized_crop can only be the first entry", hint="move it to the beginning")
        elif not isinstance(item, RandomHorizontalFlip):
            first_batched = first_batched or item.name


@_about()
def _bounds_of_augment(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    for place, item in enumerate(config.data.augment):
        if isinstance(item, (RandomErasing, RandomResizedCrop)):
            for name, (low, high) in (("scale", item.scale), ("ratio", item.ratio)):
                if low > high:
                    key = f"data.augment.{place}.{name}"
                    yield Problem(key, f"the least, {low}, is above the most, {high}", hint=f"[{high}, {low}]")


@_about("data.mix")
def _mix_does_something(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    mix = config.data.mix
    if mix.p != 1 and not (mix.mixup or mix.cutmix):
        yield Problem("data.mix.p", "is ignored: mixup and cutmix are 0", hint="--data.mix.mixup 0.2, or remove it")
