"""A detector's boxes in the pixels of image files, printed and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dist_train.errors import UsageError
from dist_train.finished_run.boxes import boxes_of, draw, drawing_folder
from dist_train.finished_run.predict import Prediction, header, require_format, shown
from dist_train.tasks.detector import Detector, Level

DETECTOR = Detector("retinanet", (32, 32), (Level((2, 2), (16, 16), 0.5, ((10.0, 10.0),)),))


def manifest(resize: int | None = None) -> dict[str, Any]:
    return {
        "task": "detection",
        "classes": ["cat", "dog"],
        "input": {"resize": resize},
        "detector": json.loads(json.dumps(DETECTOR.as_json())),
        "shown_score": 0.3,
    }


def outputs() -> dict[str, Tensor]:
    """Returns outputs for one image: a dog at the second of four places, and a cat that nobody is sure of."""
    logits = torch.full((4, 3), -9.0)
    logits[1, 2], logits[2, 1] = 4.0, -2.0
    return {"cls_logits": logits, "bbox_regression": torch.zeros(4, 4)}


@pytest.mark.parametrize(
    ("size", "resize", "corners"),
    [
        ((32, 32), None, (19, 3, 29, 13)),
        ((64, 320), None, (190, 6, 290, 26)),
        ((64, 128), 32, (70, 6, 90, 26)),  # the centre of 64 x 128, by half
        ((96, 96), 48, (54, 22, 74, 42)),
    ],
)
def test_boxes_are_in_pixels_of_the_file(size: tuple[int, int], resize: int | None, corners: tuple[float, ...]) -> None:
    (box,) = boxes_of(outputs(), size, manifest(resize))
    assert box.label == "dog" and box.score == pytest.approx(0.982, abs=1e-3)
    assert box.corners == pytest.approx(corners)


def test_boxes_are_printed() -> None:
    prediction = Prediction("a.png", outputs(), size=(32, 32))
    require_format(manifest(), "csv")
    assert header(manifest()) == "file,class,score,x1,y1,x2,y2"
    assert shown(prediction, manifest(), "csv", 1) == "a.png,dog,0.982014,19.0,3.0,29.0,13.0"
    (found,) = json.loads(shown(prediction, manifest(), "json", 1))["predictions"]
    assert found["class"] == "dog" and found["box"] == pytest.approx([19, 3, 29, 13])
    nothing = {name: each - 9 for name, each in outputs().items()}
    assert shown(Prediction("a.png", nothing, size=(32, 32)), manifest(), "csv", 1) == ""


def test_a_box_is_drawn_and_no_picture_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "black").save(file)
    folder = drawing_folder(tmp_path / "drawn", manifest())
    paths = [draw(str(file), outputs(), manifest(), folder, 10_000) for _ in range(2)]
    assert [path.name for path in paths] == ["a.png", "a-2.png"]
    with Image.open(paths[0]) as image:
        assert image.size == (64, 64)
        assert image.getpixel((57, 25)) == image.getpixel((38, 20)) != (0, 0, 0)
        assert image.getpixel((48, 22)) == image.getpixel((10, 50)) == (0, 0, 0)


def test_only_detectors_draw(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--draw is for detectors, and the artifact's task is regression"):
        drawing_folder(tmp_path / "drawn", {"task": "regression"})
    assert not (tmp_path / "drawn").exists()
