"""The datasets `shapes` and `coco`: their items, and what is wrong with a file of annotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dist_train.config.data import DataConfig, RandomHorizontalFlip, SplitConfig
from dist_train.data.datasets.coco import coco
from dist_train.data.datasets.shapes import CLASSES, shapes
from dist_train.errors import ConfigError, CorruptSampleError, DataError
from dist_train.tasks.detection import Detection


def test_shapes_are_a_function_of_their_arguments() -> None:
    data = DataConfig(name="shapes", args={"num_train": 30, "num_eval": 6, "size": 48})
    one, other = shapes(data), shapes(data)
    assert one.classes == CLASSES and one.train.input_shape == (3, 48, 48)  # type: ignore[union-attr]
    seen = torch.zeros(len(CLASSES), dtype=torch.int64)
    for index in range(30):
        image, target = one.train[index]  # type: ignore[index]
        again = other.train[index]  # type: ignore[index]
        assert image.dtype == torch.uint8 and torch.equal(image, again[0])
        assert torch.equal(target["boxes"], again[1]["boxes"])
        Detection(3, {}).check_targets({name: each[None] for name, each in target.items()})
        for label, left, top, right, bottom in target["boxes"][target["mask"]].tolist():
            seen[int(label)] += 1
            inside = image[:, int(top) : int(bottom), int(left) : int(right)].float()
            assert inside.mean() > 70 and inside.amax() >= 120  # of the noise 50 and 99
    assert bool((seen > 5).all())
    assert not torch.equal(one.train[0][0], one.eval[0][0])  # type: ignore[index]
    changed = shapes(data.model_copy(update={"args": {**data.args, "seed": 1}}))
    assert changed.train.fingerprint != one.train.fingerprint  # type: ignore[union-attr]


def test_shapes_are_mirrored_with_their_boxes() -> None:
    args = {"num_train": 4, "num_eval": 2, "size": 32}
    splits = shapes(DataConfig(name="shapes", args=args, augment=[RandomHorizontalFlip(p=1.0)]))
    (image, target), (mirrored, moved) = splits.train[1], splits.train.augmented(1, 5)  # type: ignore[index, union-attr]
    assert torch.equal(image.flip(-1), mirrored)
    assert torch.equal(32 - target["boxes"][0, [3, 1]], moved["boxes"][0, [1, 3]])


def described(**changes: Any) -> dict[str, Any]:
    """Returns a file of annotations of two images, with two boxes in the first one."""
    made: dict[str, Any] = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 20},
            {"id": 3, "file_name": "b.png", "width": 20, "height": 20},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 9, "bbox": [10, 5, 20, 10]},
            {"id": 2, "image_id": 7, "category_id": 4, "bbox": [0, 0, 40.5, 20]},
            {"id": 3, "image_id": 3, "category_id": 4, "bbox": [1, 1, 5, 5], "iscrowd": 1},
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 4, "name": "cat"}],
    }
    return made | changes


def folder(root: Path, train: Any, evaluation: Any = None) -> DataConfig:
    (root / "annotations").mkdir(exist_ok=True)
    (root / "images").mkdir(exist_ok=True)
    for name, made in (("train", train), ("val", evaluation or described())):
        text = made if isinstance(made, str) else json.dumps(made)
        (root / "annotations" / f"{name}.json").write_text(text)
    Image.new("RGB", (40, 20), "red").save(root / "images" / "a.png")
    Image.new("RGB", (20, 20), "blue").save(root / "images" / "b.png")
    return DataConfig(name="coco", root=root, args={"size": 32})


def test_coco_gives_scaled_boxes_by_class_and_clips_them(tmp_path: Path) -> None:
    splits = coco(folder(tmp_path, described()))
    assert splits.classes == ("cat", "dog") and len(splits.train) == 2  # type: ignore[arg-type]
    empty, target = splits.train[0][1], splits.train[1][1]  # type: ignore[index]
    assert not empty["mask"].any()  # the image of id 3 has a crowd only
    assert target["boxes"].tolist() == [[1.0, 8, 8, 24, 24], [0.0, 0, 0, 32, 32]]
    assert splits.train[1][0].shape == (3, 32, 32)  # type: ignore[index]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bbox": [1, 1, 0, 5]}, "annotation 1: its bbox [1, 1, 0, 5] has no area"),
        ({"bbox": [1, 1, 5]}, "not four numbers [x, y, width, height]"),
        ({"bbox": [1, 1, 5, "2"]}, "not four numbers"),
        ({"bbox": None}, "its bbox is None"),
        ({"bbox": [30, 1, 20, 5]}, "reaches beyond the image 7 of 40 x 20 pixels"),
        ({"image_id": 8}, "there is no image 8 (image_id)"),
        ({"category_id": 1}, "there is no category 1 (category_id)"),
        ({"id": 2}, "annotation 2: its id is there twice"),
        ({"id": [1]}, "annotation [1]: its id is neither a whole number nor a text"),
        ({"bbox": [10**400, 1, 5, 5]}, "not four numbers"),
        ({"bbox": [30, 1, 1e-9, 5]}, "annotation 1: its bbox [30, 1, 1e-09, 5] has no area in float32"),
        ({"iscrowd": "0"}, "annotation 1: its iscrowd is '0', neither 0 nor 1"),
    ],
)
def test_a_wrong_annotation_is_named_or_left_out(wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    made = described()
    made["annotations"][0] |= wrong
    data = folder(tmp_path, made)
    with pytest.raises(DataError) as caught:
        coco(data)
    assert said in caught.value.message and "annotations/train.json" in caught.value.message
    assert "bad_annotations drop" in str(caught.value.hint)
    with pytest.warns(UserWarning, match="; left out"):
        splits = coco(data.model_copy(update={"args": {**data.args, "bad_annotations": "drop"}}))
    assert int(splits.train[1][1]["mask"].sum()) == 1  # type: ignore[index]


def test_numbers_may_be_names_of_categories(tmp_path: Path) -> None:
    made = described(categories=[{"id": 9, "name": 1}, {"id": 4, "name": "0"}])
    assert coco(folder(tmp_path, made, made)).classes == ("0", "1")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "has no list 'images'"),
        (described(annotations=[]), "has no boxes to train on"),
        (described(categories=[{"id": 9, "name": None}]), "categories[0] has no whole number as id, or no text"),
        (described(categories=[]), "has no categories"),
        (described(images=[]), "has no images"),
        (described(images=[{"id": 7, "file_name": "../a.png", "width": 1, "height": 1}]), "leads out of the folder"),
        (described(images=[{"id": 7, "file_name": "a.png", "width": "40", "height": 1}]), "images[0] has width and"),
        (described(images=described()["images"] * 2), "images[2] has the id 7 of another"),
        (described(categories=[{"id": 9, "name": "dog"}]), "the categories of"),
        (described(images=[{"id": 7, "file_name": "c.png", "width": 40, "height": 20}]), "such as"),
    ],
)
def test_a_file_of_another_format_is_refused(made: Any, said: str, tmp_path: Path) -> None:
    if (isinstance(made, dict) and len(made["images"]) == 1) or said == "the categories of":
        made["annotations"] = []
    with pytest.raises(DataError) as caught:
        coco(folder(tmp_path, made))
    assert said in caught.value.message, caught.value.message


def test_an_image_of_another_size_than_stated_is_corrupt(tmp_path: Path) -> None:
    splits = coco(folder(tmp_path, described()))
    Image.new("RGB", (20, 40)).save(tmp_path / "images" / "a.png")
    with pytest.raises(CorruptSampleError, match=r"a.png has 20 x 40 pixels, and .*train.json says 40 x 20") as caught:
        splits.train[1]  # type: ignore[index]
    assert "EXIF" in caught.value.hint


def test_coco_needs_no_evaluation_file_where_the_training_set_is_split(tmp_path: Path) -> None:
    data = folder(tmp_path, described())
    (tmp_path / "annotations" / "val.json").unlink()
    with pytest.raises(DataError, match="val.json cannot be read"):
        coco(data)
    splits = coco(data.model_copy(update={"split": SplitConfig(eval=0.5)}))
    assert splits.eval is None and len(splits.train) == 2  # type: ignore[arg-type]


def test_coco_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"data\.root"):
        coco(DataConfig(name="coco"))
