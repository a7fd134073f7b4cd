"""Boxes of a detector's outputs in the pixels of image files, and pictures with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dist_train.data.image_file import read_image
from dist_train.errors import DataError, UsageError
from dist_train.tasks.detector import Detector, detections
from dist_train.tasks.marks import mark
from dist_train.trees import Tree, map_leaves


@dataclass(frozen=True)
class Box:
    """A detection in an image file.

    Attributes:
        label: name of its class.
        number: of its class.
        score: in 0..1.
        corners: x1, y1, x2, y2 in pixels of the file's image.
    """

    label: str
    number: int
    score: float
    corners: tuple[float, float, float, float]


def boxes_of(outputs: Tree, size: tuple[int, int], manifest: Mapping[str, Any]) -> list[Box]:
    """Returns the boxes of one image with a score of the manifest's `shown_score` or more, the most certain first.

    Args:
        outputs: of the model for this image, without the batch.
        size: height and width of the file's image.
    """
    detector = Detector.of_json(manifest["detector"])
    (found,) = detections(map_leaves(lambda leaf: leaf.unsqueeze(0), outputs), detector)
    likely = found.scores >= manifest["shown_score"]
    back = _to_file(size, detector.size, manifest["input"].get("resize"))
    return [
        Box(manifest["classes"][number], number, score, back(corners))
        for corners, score, number in zip(
            found.boxes[likely].tolist(), found.scores[likely].tolist(), found.classes[likely].tolist(), strict=True
        )
    ]


def _to_file(size: tuple[int, int], model: tuple[int, int], resize: int | None) -> Any:
    """Returns what turns corners in the model's input into corners in the file, the reverse of `image_file.centre`."""
    if resize is None:
        scale, shift = [edge / own for edge, own in zip(size, model, strict=True)], [0.0, 0.0]
    else:
        factor = min(size) / resize
        scale = [factor, factor]
        shift = [(edge - own * factor) / 2 for edge, own in zip(size, model, strict=True)]

    def back(corners: Sequence[float]) -> tuple[float, ...]:
        return tuple(
            min(max(corner * scale[1 - place % 2] + shift[1 - place % 2], 0.0), float(size[1 - place % 2]))
            for place, corner in enumerate(corners)
        )

    return back


def drawing_folder(folder: Path, manifest: Mapping[str, Any]) -> Path:
    """Makes the folder of pictures.

    Raises:
        UsageError: the artifact is of no detector.
        DataError: it cannot be made.
    """
    if "detector" not in manifest:
        raise UsageError(f"--draw is for detectors, and the artifact's task is {manifest['task']}", "leave it out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made: {error.strerror}", "--draw FOLDER that can be written") from error
    return folder


def draw(file: str, outputs: Tree, manifest: Mapping[str, Any], folder: Path, most_pixels: int) -> Path:
    """Writes a picture with the boxes of an image file, as PNG; returns its path, another one for each file.

    Raises:
        DataError: it cannot be written.
    """
    pixels = read_image(file, 3, most_pixels)
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    boxes = boxes_of(outputs, (image.height, image.width), manifest)
    mark(image, [(box.number, box.corners, f"{box.label} {box.score:.0%}") for box in boxes])
    path, number = folder / f"{Path(file).stem}.png", 1
    while path.exists():
        number += 1
        path = folder / f"{Path(file).stem}-{number}.png"
    try:
        image.save(path, "PNG")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}", "--draw FOLDER with room") from error
    return path
