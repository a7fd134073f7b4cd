"""Headers of plain JPEGs: the size that Pillow finds, and None for all that only Pillow understands."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_train.data.jpeg_header import plain_jpeg_size


def jpeg(mode: str = "RGB", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"optimize": True}, {"mode": "L"}, {"comment": b"x" * 300}, {"restart_marker_rows": 1}],
)
def test_a_plain_file_has_its_size(options: dict[str, Any]) -> None:
    assert plain_jpeg_size(jpeg(**options)) == (37, 53)


def test_turned_pictures_and_other_colours_are_left_to_pillow() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for content in (jpeg(exif=exif), jpeg(mode="CMYK"), jpeg(xmp=b"<x/>"), b"", b"\xff\xd8", b"GIF89a" * 9):
        assert plain_jpeg_size(content) is None


def test_no_damage_of_a_header_raises() -> None:
    content, generator = jpeg(), np.random.default_rng(0)
    end = content.index(b"\xff\xda")
    for length in range(end):
        assert plain_jpeg_size(content[:length]) is None
    for _ in range(2000):
        spoilt = bytearray(content)
        spoilt[generator.integers(end)] = generator.integers(256)
        plain_jpeg_size(bytes(spoilt))
