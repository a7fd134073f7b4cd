"""Tests finding and decoding images, and their conversion to a model's size and channels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.io import write_jpeg, write_png
from torchvision.transforms.v2 import functional as transforms

from dist_train.errors import DataError, UsageError
from dist_train.finished_run.predict import Prediction, image_files, read_image, require_format, shown


def picture(height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


def test_folders_and_patterns_are_expanded_in_order_and_other_files_left_out(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert image_files([str(tmp_path)]) == [str(tmp_path / name) for name in ("a.JPG", "b.png", "sub/c.webp")]
    assert image_files([str(tmp_path / "**" / "*.webp")]) == [str(tmp_path / "sub" / "c.webp")]
    assert image_files([str(tmp_path / "notes.txt")]) == [str(tmp_path / "notes.txt")]  # any suffix
    with pytest.raises(DataError, match=r"there is no file .*\*\.gif"):
        image_files([str(tmp_path / "*.gif")])


def test_an_image_of_the_model_s_size_is_left_as_it_is(tmp_path: Path) -> None:
    write_png(picture(8, 6), str(tmp_path / "a.png"))
    assert torch.equal(read_image(str(tmp_path / "a.png"), (3, 8, 6), None), picture(8, 6))


def test_gray_and_colour_become_what_the_model_takes(tmp_path: Path) -> None:
    write_png(picture(8, 8, 1), str(tmp_path / "gray.png"))
    write_png(picture(8, 8, 3), str(tmp_path / "colour.png"))
    assert torch.equal(read_image(str(tmp_path / "gray.png"), (3, 8, 8), None), picture(8, 8, 1).expand(3, -1, -1))
    gray = read_image(str(tmp_path / "colour.png"), (1, 8, 8), None)
    expected = transforms.rgb_to_grayscale(picture(8, 8, 3))
    assert (gray.int() - expected.int()).abs().max() <= 1  # the decoder rounds differently


def test_resize_is_of_the_shorter_edge_and_then_the_centre_is_cut_out(tmp_path: Path) -> None:
    write_png(picture(20, 40), str(tmp_path / "wide.png"))
    got = read_image(str(tmp_path / "wide.png"), (3, 8, 8), 10)
    small = transforms.resize(picture(20, 40), [10, 20], antialias=True)
    assert torch.equal(got, small[:, 1:9, 6:14])
    squeezed = read_image(str(tmp_path / "wide.png"), (3, 8, 8), None)
    assert torch.equal(squeezed, transforms.resize(picture(20, 40), [8, 8], antialias=True))


def test_a_cut_jpeg_and_a_text_are_errors_that_name_the_file(tmp_path: Path) -> None:
    write_jpeg(picture(32, 32), str(tmp_path / "whole.jpg"))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    for name in ("cut.jpg", "text.png"):
        with pytest.raises(DataError, match=rf"{name} cannot be read as an image"):
            read_image(str(tmp_path / name), (3, 32, 32), None)


def test_other_tasks_give_their_raw_outputs_and_only_as_json() -> None:
    manifest = {"task": "regression", "classes": []}
    text = shown(Prediction("a.png", torch.tensor([0.5, -1.0])), manifest, "json", 1)
    assert text == '{"file": "a.png", "outputs": [0.5, -1.0]}'
    with pytest.raises(UsageError, match="csv is for classification, and the artifact's task is regression"):
        require_format(manifest, "csv")


def test_a_comma_in_a_file_s_name_does_not_break_the_csv() -> None:
    manifest = {"task": "classification", "classes": ["cat", "dog"]}
    text = shown(Prediction("a,b.png", torch.tensor([0.0, 1.0])), manifest, "csv", 2)
    assert text == '"a,b.png",dog,0.731059\n"a,b.png",cat,0.268941'
