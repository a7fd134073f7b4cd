"""Predictions of an artifact's model for image files."""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional as transforms

from dist_train.artifact.load import load_artifact
from dist_train.data.augment.steps import Augmentation
from dist_train.errors import ArtifactError, DataError, UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp")
"""What is taken from a folder; a file that is named is read whatever its suffix."""
_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB, 4: ImageReadMode.RGB_ALPHA}
_BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """What the model says of one file.

    Attributes:
        outputs: float32, one row of the model's outputs; None where the file is no readable image.
        error: why not.
    """

    file: str
    outputs: Tensor | None = None
    error: str = ""


def image_files(arguments: Sequence[str]) -> list[str]:
    """The files that were named: themselves, the images in a folder and below it (by suffix), or what a pattern matches.

    Raises:
        DataError: a name or pattern matches nothing.
    """
    files: list[str] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = sorted(str(each) for each in path.rglob("*") if each.suffix.lower() in SUFFIXES)
        else:
            found = [argument] if path.exists() else sorted(glob.glob(argument, recursive=True))
        if not found:
            what = f"{path} holds no image ({', '.join(SUFFIXES)})" if path.is_dir() else f"there is no file {argument}"
            raise DataError(what, "name image files, folders of images, or patterns such as 'photos/*.png'")
        files += found
    return files


def read_image(file: str, shape: Sequence[int], resize: int | None) -> Tensor:
    """The image as a model of this input shape takes it: uint8 [C, H, W], turned upright as its EXIF data says.

    shape: (C, H, W), with C of 1 (gray), 3 (RGB) or 4 (RGB and alpha).
    resize: length that the shorter edge gets before the centre is cut out; None: the image is made H x W, whatever its own shape.

    Raises:
        DataError: the file cannot be read or decoded.
    """
    channels, height, width = shape
    try:
        image = decode_image(file, mode=_MODES[channels], apply_exif_orientation=True)
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{file} cannot be read as an image: {reason}", f"give {', '.join(SUFFIXES)} files") from error
    if tuple(image.shape[1:]) == (height, width):
        return image
    if resize is None:
        return transforms.resize(image, [height, width], antialias=True)
    return transforms.center_crop(transforms.resize(image, [resize], antialias=True), [height, width])


def predict(artifact: Path | str, files: Sequence[str], model: str | None = None) -> Iterator[Prediction]:
    """The model's outputs for each file, in their order; a file that cannot be read gives its error and no outputs.

    artifact: an export directory, a run directory with one, or a model's file in it. model: as in `load_artifact`.

    Raises:
        ArtifactError: as `load_artifact` does, and where the model takes no images.
    """
    call, manifest = load_artifact(artifact, model)
    shape = manifest["input"]["shape"][1:]
    if len(shape) != 3 or shape[0] not in _MODES or manifest["normalization"] is None:
        raise ArtifactError(f"the model takes {shape}, which is no image", "use dist_train.load_artifact in Python")
    statistics = manifest["normalization"]
    normalize = Augmentation([], seed=0, mean=statistics["mean"], std=statistics["std"]).normalize
    remaining = iter(files)
    while batch := list(islice(remaining, _BATCH)):
        read: dict[int, Tensor] = {}
        errors: dict[int, str] = {}
        for place, file in enumerate(batch):
            try:
                read[place] = read_image(file, shape, manifest["input"].get("resize"))
            except DataError as error:
                errors[place] = error.message
        outputs = dict(zip(read, call(normalize(torch.stack(list(read.values())))), strict=True)) if read else {}
        for place, file in enumerate(batch):
            yield Prediction(file, outputs.get(place), errors.get(place, ""))


def rows(prediction: Prediction, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
    """The `top` classes of a classification, the likeliest first: {"class", "probability"} by softmax."""
    assert prediction.outputs is not None
    probabilities, places = prediction.outputs.float().softmax(0).topk(min(top, len(classes)))
    return [
        {"class": classes[place], "probability": probability}
        for place, probability in zip(places.tolist(), probabilities.tolist(), strict=True)
    ]


def shown(prediction: Prediction, manifest: Mapping[str, Any], format: str, top: int) -> str:
    """One file's prediction as text: lines of CSV (file, class, probability), or an object of JSON on one line.

    A task that is not a classification gives its raw outputs, as JSON only.
    """
    assert prediction.outputs is not None
    if manifest["task"] != "classification":
        return json.dumps({"file": prediction.file, "outputs": prediction.outputs.tolist()})
    found = rows(prediction, manifest["classes"], top)
    if format == "json":
        return json.dumps({"file": prediction.file, "predictions": found})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([prediction.file, row["class"], f"{row['probability']:.6f}"] for row in found)
    return text.getvalue().rstrip("\n")


def require_format(manifest: Mapping[str, Any], format: str) -> None:
    """Raises UsageError where the task's outputs are no table."""
    if format == "csv" and manifest["task"] != "classification":
        raise UsageError(
            f"csv is for classification, and the artifact's task is {manifest['task']}", "type --format json"
        )
