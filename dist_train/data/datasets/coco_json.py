"""Reads COCO's JSON of annotations into arrays, and lists annotations that are wrong."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from reprlib import repr as shortened
from typing import Any

import numpy as np

from dist_train.errors import DataError, escaped

_FORMAT = "COCO's format: {images: [{id, file_name, width, height}], annotations: [...], categories: [{id, name}]}"
_BEYOND = 1.0  # pixels that a box may reach beyond its image by rounding; it is clipped


@dataclass(frozen=True)
class Annotations:
    """The images of one file with their boxes.

    Attributes:
        path: of the file.
        sha256: of its bytes.
        categories: id and name, in the order of the ids.
        names: the images' file names, in the order of their ids.
        sizes: int64 [N, 2], height and width of the images.
        mistakes: a line for each annotation that is wrong and left out.
    """

    path: Path
    sha256: str
    categories: list[tuple[int, str]]
    names: list[str]
    sizes: np.ndarray
    mistakes: list[str]
    _starts: np.ndarray
    _rows: np.ndarray

    def boxes(self, index: int) -> np.ndarray:
        """Returns an image's boxes, float32 [M, 5]: class from 0, x1, y1, x2, y2 in pixels; by annotation id."""
        return self._rows[self._starts[index] : self._starts[index + 1]].copy()

    @property
    def most(self) -> int:
        """The most boxes of an image."""
        return int(np.diff(self._starts).max(initial=0))


def read_annotations(path: Path) -> Annotations:
    """Reads a file. Crowds (`iscrowd`) are left out: they are no single object.

    Raises:
        DataError: the file cannot be read, is no JSON, or its images and categories are not of this format.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}",
            "--data.args.train_json and eval_json are the files of annotations in data.root",
        ) from error
    try:
        read = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON: {escaped(str(error))}", f"give a file of {_FORMAT}") from error
    for part in ("images", "annotations", "categories"):
        if not isinstance(read, dict) or not isinstance(read.get(part), list):
            raise DataError(f"{path} has no list {part!r}", f"give a file of {_FORMAT}")
    categories = _categories(path, read["categories"])
    images = _images(path, read["images"])
    places = {image["id"]: place for place, image in enumerate(images)}
    classes = {number: place for place, (number, _) in enumerate(categories)}
    sizes = np.array([[image["height"], image["width"]] for image in images], dtype=np.int64)
    kept, mistakes = [], []
    seen = set[Any]()
    for place, each in enumerate(read["annotations"]):
        wrong = _mistake(each, places, classes, sizes)
        if not wrong and each.get("iscrowd"):
            continue
        number = each.get("id") if isinstance(each, dict) else None
        if not wrong and number in seen:
            wrong = "its id is there twice"
        if wrong:
            mistakes.append(_named(place, each, wrong))
            continue
        if number is not None:
            seen.add(number)
        kept.append((places[each["image_id"]], place, classes[each["category_id"]], each["bbox"]))
    kept.sort(key=lambda row: row[:2])
    rows = np.array([_row(label, bbox) for _, _, label, bbox in kept], dtype=np.float32).reshape(-1, 5)
    owners = np.array([row[0] for row in kept], dtype=np.int64)
    rows[:, 1:] = np.clip(rows[:, 1:], 0, np.tile(sizes[owners][:, ::-1], 2))
    has_area = (rows[:, 3:] > rows[:, 1:3]).all(1)
    for at in np.flatnonzero(~has_area):
        place, bbox = kept[at][1], kept[at][3]
        mistakes.append(_named(place, read["annotations"][place], f"its bbox {bbox} has no area in float32"))
    rows, owners = rows[has_area], owners[has_area]
    starts = np.searchsorted(owners, np.arange(len(images) + 1))
    names = [image["file_name"] for image in images]
    return Annotations(path, hashlib.sha256(content).hexdigest(), categories, names, sizes, mistakes, starts, rows)


def _named(place: int, each: Any, wrong: str) -> str:
    number = each.get("id") if isinstance(each, dict) else None
    return escaped(f"annotations[{place}]: {wrong}" if number is None else f"annotation {shortened(number)}: {wrong}")


def _row(label: int, bbox: list[float]) -> list[float]:
    x, y, width, height = bbox
    return [label, x, y, x + width, y + height]


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63


def _mistake(each: Any, places: dict[Any, int], classes: dict[Any, int], sizes: np.ndarray) -> str:
    """Says what is wrong with an annotation; "" for nothing. Of a crowd, its box is not judged."""
    if not isinstance(each, dict):
        return f"it is a {type(each).__name__}, not an object"
    if not isinstance(each.get("id"), (int, str, type(None))):
        return "its id is neither a whole number nor a text"
    crowd = each.get("iscrowd")
    if crowd is not None and not (isinstance(crowd, (int, float)) and crowd in (0, 1)):
        return f"its iscrowd is {shortened(crowd)}, neither 0 nor 1"
    for key, known, what in (("image_id", places, "image"), ("category_id", classes, "category")):
        number = each.get(key)
        if not isinstance(number, (int, str)) or number not in known:
            return f"there is no {what} {shortened(number)} ({key})"
    return "" if crowd else _box_mistake(each["image_id"], each.get("bbox"), sizes[places[each["image_id"]]])


def _box_mistake(image: Any, bbox: Any, size: np.ndarray) -> str:
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        return f"its bbox is {shortened(bbox)}, not four numbers [x, y, width, height]"
    x, y, width, height = bbox
    if width <= 0 or height <= 0:
        return f"its bbox {bbox} has no area: width and height must be above 0"
    tall, wide = size.tolist()
    if min(x, y) < -_BEYOND or x + width > wide + _BEYOND or y + height > tall + _BEYOND:
        return f"its bbox {bbox} reaches beyond the image {image} of {wide} x {tall} pixels"
    if min(x + width, wide) <= max(x, 0) or min(y + height, tall) <= max(y, 0):
        return f"its bbox {bbox} lies outside the image {image} of {wide} x {tall} pixels"
    return ""


def _categories(path: Path, given: list[Any]) -> list[tuple[int, str]]:
    found = [(each["id"], str(each["name"])) for each in _entries(path, "categories", given, _category)]
    if not found:
        raise DataError(f"{path} has no categories", f"give a file of {_FORMAT}")
    return sorted(found)


def _category(each: Any) -> str:
    kinds: dict[str, Any] = {"id": int, "name": (str, int)}
    if not isinstance(each, dict) or not all(isinstance(each.get(key), kind) for key, kind in kinds.items()):
        return "has no whole number as id, or no text or number as name"
    return ""


def _images(path: Path, given: list[Any]) -> list[dict[str, Any]]:
    found = list(_entries(path, "images", given, _image))
    if not found:
        raise DataError(f"{path} has no images", f"give a file of {_FORMAT}")
    return sorted(found, key=lambda image: (str(type(image["id"])), image["id"]))


def _image(each: Any) -> str:
    if not isinstance(each, dict) or not isinstance(each.get("id"), (int, str)):
        return "has no id"
    name = each.get("file_name")
    if not isinstance(name, str) or not name:
        return "has no file_name"
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
        return f"has the file_name {name!r}, which leads out of the folder of images"
    sides = [each.get(side) for side in ("width", "height")]
    if not all(isinstance(side, int) and 0 < side < 2**31 for side in sides):
        return f"has width and height {sides[0]!r} and {sides[1]!r}, not whole numbers above 0"
    return ""


def _entries(path: Path, part: str, given: list[Any], mistake: Callable[[Any], str]) -> Iterator[dict[str, Any]]:
    """Yields the entries of a list.

    Raises:
        DataError: one is wrong, or an id is there twice.
    """
    seen = set()
    for place, each in enumerate(given):
        wrong = mistake(each)
        if not wrong and each["id"] in seen:
            wrong = f"has the id {each['id']!r} of another"
        if wrong:
            raise DataError(escaped(f"{path}: {part}[{place}] {wrong}"), f"correct it there; {_FORMAT}")
        seen.add(each["id"])
        yield each
