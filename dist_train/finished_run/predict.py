"""Predicts image files with an artifact's model."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_train.artifact.load import load_artifact
from dist_train.data.augment.steps import Augmentation
from dist_train.data.image_file import CHANNELS, EXTENSIONS, centre, read_image
from dist_train.data.image_listing import list_images
from dist_train.errors import ArtifactError, DataError, UsageError, escaped

_BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """The prediction for one file.

    Attributes:
        outputs: float32, the model's outputs for the file; None if it is not a readable image.
        error: the reason if `outputs` is None, else "".
    """

    file: str
    outputs: Tensor | None = None
    error: str = ""


def image_files(arguments: Sequence[str]) -> list[str]:
    """Returns the image files that the arguments name: files, folders (searched recursively) or glob patterns.

    Hidden files and folders inside a folder are left out. A file given by name is taken with any extension.

    Raises:
        DataError: a name or pattern matches nothing.
    """
    files: list[str] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            found = [str(path / name) for name, _ in list_images(path, path).files]
        elif os.path.lexists(path):
            found = [argument]
        else:
            found = sorted(name for name in glob.glob(argument, recursive=True) if not os.path.isdir(name))
        if not found:
            kinds = ", ".join(EXTENSIONS)
            what = f"{path} holds no image ({kinds})" if path.is_dir() else f"there is no file {argument}"
            raise DataError(what, "name image files, folders of images, or patterns such as 'photos/*.png'")
        files += found
    return files


def predict(artifact: Path | str, files: Sequence[str], model: str | None = None) -> Iterator[Prediction]:
    """Yields a prediction for each file, in order. A file that cannot be read gives an error instead of outputs.

    artifact: an export directory, a run directory with one, or a model's file in it.
    model: name of the model, as in `load_artifact`.

    Raises:
        ArtifactError: the artifact cannot be loaded, or its model does not take images.
    """
    call, manifest = load_artifact(artifact, model)
    shape = manifest["input"]["shape"][1:]
    if len(shape) != 3 or shape[0] not in CHANNELS or manifest["normalization"] is None:
        raise ArtifactError(
            f"the model takes inputs of shape {shape}, not images", "use dist_train.load_artifact in Python"
        )
    channels, height, width = shape
    statistics = manifest["normalization"]
    normalize = Augmentation([], seed=0, mean=statistics["mean"], std=statistics["std"]).normalize
    remaining = iter(files)
    while batch := list(islice(remaining, _BATCH)):
        read: dict[int, Tensor] = {}
        errors: dict[int, str] = {}
        for place, file in enumerate(batch):
            try:
                read[place] = centre(read_image(file, channels), height, width, manifest["input"].get("resize"))
            except DataError as error:
                errors[place] = error.message
        outputs = dict(zip(read, call(normalize(torch.stack(list(read.values())))), strict=True)) if read else {}
        for place, file in enumerate(batch):
            yield Prediction(file, outputs.get(place), errors.get(place, ""))


def rows(prediction: Prediction, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
    """Returns the `top` likeliest classes, likeliest first: {"class", "probability"}, by softmax."""
    assert prediction.outputs is not None
    probabilities, places = prediction.outputs.float().softmax(0).topk(min(top, len(classes)))
    return [
        {"class": classes[place], "probability": probability}
        for place, probability in zip(places.tolist(), probabilities.tolist(), strict=True)
    ]


def shown(prediction: Prediction, manifest: Mapping[str, Any], format: str, top: int) -> str:
    """Formats one file's prediction: lines of CSV (file, class, probability), or a JSON object on one line.

    For tasks other than classification it gives the raw outputs, as JSON. A name that is no UTF-8 is escaped.
    """
    assert prediction.outputs is not None
    file = escaped(prediction.file)
    if manifest["task"] != "classification":
        return json.dumps({"file": file, "outputs": prediction.outputs.tolist()})
    found = rows(prediction, manifest["classes"], top)
    if format == "json":
        return json.dumps({"file": file, "predictions": found})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([file, row["class"], f"{row['probability']:.6f}"] for row in found)
    return text.getvalue().rstrip("\n")


def require_format(manifest: Mapping[str, Any], format: str) -> None:
    """Raises UsageError for CSV if the task is not classification."""
    if format == "csv" and manifest["task"] != "classification":
        raise UsageError(
            f"csv is for classification, and the artifact's task is {manifest['task']}", "type --format json"
        )
