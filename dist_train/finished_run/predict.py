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
from dist_train.artifact.store import EXPORT_AGAIN
from dist_train.data.augment.steps import Augmentation
from dist_train.data.image_file import CHANNELS, EXTENSIONS, MOST_PIXELS, centre, read_image
from dist_train.data.image_listing import list_images
from dist_train.errors import ArtifactError, DataError, UsageError, csv_cell, escaped
from dist_train.finished_run.boxes import Box, boxes_of
from dist_train.trees import Tree, map_leaves

_BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """The prediction for one file.

    Attributes:
        outputs: float32, the model's outputs for the file, a tensor or a tree; None if it is not a readable image.
        error: the reason if `outputs` is None, else "".
        size: height and width of the image in pixels.
    """

    file: str
    outputs: Tree | None = None
    error: str = ""
    size: tuple[int, int] = (0, 0)


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
            found = [str(path / file.path) for file in list_images(path, path).files]
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


def predict(
    artifact: Path | str, files: Sequence[str], model: str | None = None, max_pixels: int = MOST_PIXELS
) -> Iterator[Prediction]:
    """Yields a prediction for each file, in order. A file that cannot be read gives an error instead of outputs.

    artifact: an export directory, a run directory with one, or a model's file in it.
    model: name of the model, as in `load_artifact`.
    max_pixels: most pixels of an image; a larger one gives an error.

    Raises:
        ArtifactError: the artifact cannot be loaded, or its model does not take images. Or it gives other outputs than
            a logit for each class.
    """
    call, manifest = load_artifact(artifact, model, postprocess=False)
    if "input" not in manifest:
        names = ", ".join(leaf["name"] for leaf in manifest["inputs"])
        raise ArtifactError(
            f"predict reads image files, and the model takes several inputs: {names}",
            "call it in Python: model, manifest = dist_train.load_artifact(PATH); or evaluate it on the run's data: "
            "dist-train evaluate RUN_DIR --model PATH",
        )
    shape = manifest["input"]["shape"][1:]
    if len(shape) != 3 or shape[0] not in CHANNELS or None in shape or manifest["normalization"] is None:
        raise ArtifactError(
            f"the model takes inputs of shape {shape}, not images", "use dist_train.load_artifact in Python"
        )
    channels, height, width = shape
    resize, classes = manifest["input"].get("resize"), len(manifest["classes"])
    statistics = manifest["normalization"]
    if len(statistics["mean"]) != channels:
        raise ArtifactError(
            "the model was trained on finished tensors: the artifact does not say how an image becomes one",
            "use dist_train.load_artifact in Python; or train on uint8 images with Splits.mean and Splits.std",
        )
    inside = manifest["input"]["dtype"] == "uint8"
    normalize = Augmentation([], seed=0, mean=statistics["mean"], std=statistics["std"]).normalize
    remaining = iter(files)
    while batch := list(islice(remaining, _BATCH)):
        read: dict[int, Tensor] = {}
        sizes: dict[int, tuple[int, int]] = {}
        errors: dict[int, str] = {}
        for place, file in enumerate(batch):
            try:
                image = read_image(file, channels, max_pixels)
                read[place], sizes[place] = centre(image, height, width, resize), (image.shape[1], image.shape[2])
            except DataError as error:
                errors[place] = error.message
        images = torch.stack(list(read.values())) if read else torch.empty(0)
        answers = call(images if inside else normalize(images)) if read else images
        if read and manifest["task"] == "classification" and tuple(answers.shape) != (len(read), classes):
            raise ArtifactError(
                f"the model answers with shape {list(answers.shape)} to {len(read)} images, and the manifest has "
                f"{classes} classes",
                EXPORT_AGAIN,
            )
        outputs = {place: _row(answers, row) for row, place in enumerate(read)}
        for place, file in enumerate(batch):
            yield Prediction(file, outputs.get(place), errors.get(place, ""), sizes.get(place, (0, 0)))


def _row(outputs: Tree, row: int) -> Tree:
    return map_leaves(lambda leaf: leaf[row], outputs)


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

    Of detection these are its boxes, with score and corners. For other tasks it gives the raw outputs, as JSON. A name
    that is no UTF-8 is escaped, and in CSV one that a spreadsheet would compute begins with an apostrophe (see
    `csv_cell`).
    """
    assert prediction.outputs is not None
    file = escaped(prediction.file)
    if "detector" in manifest:
        return _shown_boxes(file, boxes_of(prediction.outputs, prediction.size, manifest), format)
    if manifest["task"] != "classification":
        return json.dumps({"file": file, "outputs": map_leaves(Tensor.tolist, prediction.outputs)})
    found = rows(prediction, manifest["classes"], top)
    if format == "json":
        return json.dumps({"file": file, "predictions": found})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([csv_cell(file), csv_cell(row["class"]), f"{row['probability']:.6f}"] for row in found)
    return text.getvalue().rstrip("\n")


def _shown_boxes(file: str, boxes: Sequence[Box], format: str) -> str:
    if format == "json":
        found = [{"class": box.label, "score": box.score, "box": list(box.corners)} for box in boxes]
        return json.dumps({"file": file, "predictions": found})
    text = io.StringIO()
    corners = [[f"{corner:.1f}" for corner in box.corners] for box in boxes]
    csv.writer(text, lineterminator="\n").writerows(
        [csv_cell(file), csv_cell(box.label), f"{box.score:.6f}", *numbers]
        for box, numbers in zip(boxes, corners, strict=True)
    )
    return text.getvalue().rstrip("\n")


def header(manifest: Mapping[str, Any]) -> str:
    """Returns the first line of CSV."""
    return "file,class,score,x1,y1,x2,y2" if "detector" in manifest else "file,class,probability"


def require_format(manifest: Mapping[str, Any], format: str) -> None:
    """Raises UsageError for CSV if the task is neither classification nor detection."""
    if format == "csv" and manifest["task"] != "classification" and "detector" not in manifest:
        raise UsageError(
            f"csv is for classification and detection, not for {manifest['task']}",
            "type --format json",
        )
