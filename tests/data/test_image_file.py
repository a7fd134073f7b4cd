"""Tests reading image files: orientation, kinds of pixels, animations, damage, and the cut for evaluation."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.io import decode_image

from dist_train.data import image_file
from dist_train.data.image_file import centre, read_image
from dist_train.errors import CorruptSampleError, DataError
from tests.support.crafted import MOST_MEGABYTES, refusal
from tests.support.image_files import photo

PICTURE = photo(1, (200, 100, 50))
GRAY = PICTURE.convert("L")


def pixels(image: Image.Image) -> torch.Tensor:
    array = np.array(image)
    return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1)


def difference(found: torch.Tensor, expected: Image.Image | torch.Tensor) -> float:
    other = pixels(expected) if isinstance(expected, Image.Image) else expected
    assert found.dtype == torch.uint8 and found.shape == other.shape
    return float((found.int() - other.int()).abs().max())


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_files_are_turned_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    path = tmp_path / f"turned.{kind}"
    PICTURE.save(path, exif=_exif(orientation), **({"lossless": True} if kind == "webp" else {}))
    with Image.open(path) as stored:
        expected = ImageOps.exif_transpose(stored)
        assert expected.size == ((60, 48) if orientation < 5 else (48, 60))
        assert difference(read_image(path), expected) == 0


def test_the_orientation_is_found_behind_other_metadata_and_in_xmp(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "plain.jpg", quality=95)
    PICTURE.save(tmp_path / "exif.jpg", quality=95, exif=_exif(6))
    plain, turned = (read_image(tmp_path / name) for name in ("plain.jpg", "exif.jpg"))
    assert torch.equal(turned, plain.rot90(-1, (1, 2)))

    def app1(payload: bytes) -> bytes:
        return b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload

    name = b"http://ns.adobe.com/xap/1.0/\0"
    content = (tmp_path / "exif.jpg").read_bytes()
    (tmp_path / "second.jpg").write_bytes(content[:2] + app1(name + b"<x:xmpmeta/>") + content[2:])
    assert torch.equal(read_image(tmp_path / "second.jpg"), turned)
    content = (tmp_path / "plain.jpg").read_bytes()
    (tmp_path / "xmp.jpg").write_bytes(content[:2] + app1(name + b'<x tiff:Orientation="6"/>') + content[2:])
    assert torch.equal(read_image(tmp_path / "xmp.jpg"), turned)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", _exif(77)])
def test_damaged_exif_data_do_not_spoil_an_image(tmp_path: Path, exif: Any) -> None:
    PICTURE.save(tmp_path / "a.jpg", quality=95, exif=exif)
    PICTURE.save(tmp_path / "b.jpg", quality=95)
    assert torch.equal(read_image(tmp_path / "a.jpg"), read_image(tmp_path / "b.jpg"))


def _deep(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image).astype(np.uint16) * 257)


def _png16(image: Image.Image) -> bytes:
    """A PNG of 16 bits per colour, which Pillow cannot write."""
    rows = (np.asarray(image).astype(np.uint16) * 257).astype(">u2")
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", image.width, image.height, 16, 2, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def _translucent(mode: str) -> Image.Image:
    image = PICTURE.convert(mode)
    image.putalpha(GRAY)
    return image


def _rows(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def _without_adobe(content: bytes) -> bytes:
    place = content.index(b"\xff\xee")
    length = struct.unpack(">H", content[place + 2 : place + 4])[0]
    return content[:place] + content[place + 2 + length :]


_INDEXED = PICTURE.quantize(16)
KINDS: dict[str, tuple[bytes, Image.Image]] = {
    "cmyk.jpg": (_rows(PICTURE.convert("CMYK"), "JPEG", quality=98), PICTURE),
    "unmarked_cmyk.jpg": (_without_adobe(_rows(PICTURE.convert("CMYK"), "JPEG", quality=98)), PICTURE),
    "cmyk.tiff": (_rows(PICTURE.convert("CMYK"), "TIFF"), PICTURE),
    "gray.jpg": (_rows(GRAY, "JPEG", quality=98), GRAY),
    "progressive.jpg": (_rows(PICTURE, "JPEG", quality=98, progressive=True), PICTURE),
    "one_bit.png": (_rows(GRAY.convert("1"), "PNG"), GRAY.convert("1").convert("L")),
    "gray_alpha.png": (_rows(_translucent("LA"), "PNG"), GRAY),
    "alpha.webp": (_rows(_translucent("RGBA"), "WEBP", lossless=True, exact=True), PICTURE),
    "palette.png": (_rows(_INDEXED, "PNG"), _INDEXED.convert("RGB")),
    "palette_clear.png": (_rows(_INDEXED, "PNG", transparency=0), _INDEXED.convert("RGB")),
    "palette_alpha.png": (_rows(_INDEXED, "PNG", transparency=bytes(range(16))), _INDEXED.convert("RGB")),
    "sixteen.png": (_rows(_deep(GRAY), "PNG"), GRAY),
    "sixteen_colours.png": (_png16(PICTURE), PICTURE),
    "sixteen.tiff": (_rows(_deep(GRAY), "TIFF"), GRAY),
    "gif.jpg": (_rows(_INDEXED, "GIF"), _INDEXED.convert("RGB")),
    "bmp.png": (_rows(PICTURE, "BMP"), PICTURE),
}


@pytest.mark.parametrize("name", KINDS)
def test_all_kinds_of_pixels_have_the_right_colours(tmp_path: Path, name: str) -> None:
    content, expected = KINDS[name]
    (tmp_path / name).write_bytes(content)
    bound = 12 if name.endswith("jpg") and "gif" not in name else 0  # JPEG's loss
    assert difference(read_image(tmp_path / name), expected.convert("RGB")) <= bound
    assert difference(read_image(tmp_path / name, 1), expected.convert("L")) <= max(bound, 1)
    with_alpha = read_image(tmp_path / name, 4)
    assert difference(with_alpha[:3], expected.convert("RGB")) <= bound
    opaque = not ("alpha" in name or "clear" in name)
    assert bool((with_alpha[3] == 255).all()) == opaque


def test_pixels_without_a_known_scale_are_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "depth.tiff")
    with pytest.raises(CorruptSampleError, match=r"depth\.tiff cannot be decoded: its pixels are 32-bit numbers"):
        read_image(tmp_path / "depth.tiff")


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_the_first_frame_of_an_animation_is_read_and_said_once(
    tmp_path: Path, format: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_file, "_said", set())
    others = [photo(2, (10, 200, 10)), photo(3, (10, 10, 200))]
    first = _INDEXED if format == "GIF" else PICTURE
    for name in ("a.png", "b.png"):
        first.save(tmp_path / name, format=format, save_all=True, append_images=others, **options)
    with pytest.warns(UserWarning, match=rf"a\.png has several frames: the first is read.* such {format} files"):
        assert difference(read_image(tmp_path / "a.png"), first.convert("RGB")) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        read_image(tmp_path / "b.png")


def test_the_second_picture_in_a_phone_s_jpeg_is_not_an_animation(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[GRAY.convert("RGB")], quality=98)
    with warnings.catch_warnings(), Image.open(tmp_path / "a.jpg") as first:
        warnings.simplefilter("error", UserWarning)
        assert first.format == "MPO"
        assert difference(read_image(tmp_path / "a.jpg"), first) <= 1


def _huge_png() -> bytes:
    content = bytearray(_rows(PICTURE, "PNG"))
    content[16:24] = struct.pack(">II", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def _huge_jpeg() -> bytes:
    content = bytearray(_rows(PICTURE, "JPEG"))
    place = content.index(b"\xff\xc0")
    content[place + 5 : place + 9] = struct.pack(">HH", 60000, 60000)
    return bytes(content)


def _half(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jpg", b"", "is empty"),
        ("page.jpg", b"<html>", "cannot be decoded: not a JPEG, PNG"),
        ("head.png", _rows(PICTURE, "PNG")[:12], "cannot be decoded"),
        *((f"half.{kind}", _half(_rows(PICTURE, kind)), "cannot be decoded") for kind in ("PNG", "JPEG", "WEBP")),
        *((f"half.{kind}", _half(_rows(_INDEXED, kind)), "cannot be decoded") for kind in ("GIF", "BMP", "TIFF")),
        ("huge.png", _huge_png(), "is too large: 3600000000 pixels, where 100,000,000 pixels are the most"),
        ("huge.jpg", _huge_jpeg(), "is too large: 3600000000 pixels, where 100,000,000 pixels are the most"),
        ("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be decoded: not a JPEG"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str, channels: int) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptSampleError, match=rf"{name} {message}") as caught:
        read_image(tmp_path / name, channels)
    assert "--data.on_corrupt skip" in caught.value.hint and "cpp" not in caught.value.message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_no_damage_ends_in_another_error(tmp_path: Path, kind: str) -> None:
    whole = _rows(_INDEXED if kind in ("GIF", "PNG") else PICTURE, kind)
    generator = np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(whole)
        for place in generator.integers(0, min(len(content), 300), 4):
            content[place] = generator.integers(256)
        (tmp_path / "a").write_bytes(content)
        with contextlib.suppress(CorruptSampleError):
            assert read_image(tmp_path / "a").dtype == torch.uint8


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("../nowhere/4f.png")
    (tmp_path / "round.png").symlink_to("round.png")
    for name, message in (
        ("folder.png", "is a folder"),
        ("link.png", "is a link that leads nowhere: ../nowhere/4f.png"),
        ("round.png", "is a link that leads nowhere: round.png"),
    ):
        with pytest.raises(CorruptSampleError, match=rf"{name} {message}"):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match=r"gone\.png cannot be read: No such file") as caught:
        read_image(tmp_path / "gone.png")
    assert not isinstance(caught.value, CorruptSampleError), "a failing disk is not to be skipped"


def test_a_pipe_is_read(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, _rows(PICTURE, "PNG"))
    os.close(writing)
    assert difference(read_image(f"/dev/fd/{reading}"), PICTURE) == 0
    os.close(reading)


@pytest.mark.parametrize("save", [lambda p: PICTURE.save(p), lambda p: PICTURE.save(p, quality=80, subsampling=2)])
def test_ordinary_jpegs_have_the_pixels_of_torchvision(tmp_path: Path, save: Callable[[Path], None]) -> None:
    save(tmp_path / "a.jpg")
    assert torch.equal(read_image(tmp_path / "a.jpg"), decode_image(str(tmp_path / "a.jpg")))


def test_the_shorter_edge_is_scaled_and_the_centre_cut_out_at_any_size() -> None:
    image = pixels(PICTURE)
    cut = centre(image, 8, 8, 12)
    small = torch.nn.functional.interpolate(image[None].float(), (12, 15), mode="bilinear", antialias=True)[0]
    assert (cut.float() - small[:, 2:10, 4:12]).abs().max() <= 1.01
    own_size = centre(image[:, :32, :32], 32, 32, 40)
    assert not torch.equal(own_size, image[:, :32, :32]), "an image of the input's size is cut like all others"
    assert centre(image, 10, 20, None).shape == (3, 10, 20)
    assert torch.equal(centre(image, 48, 60, None), image)


def _blank(width: int, height: int) -> bytes:
    """A PNG of zeros: a few KB whatever its size."""
    lines = zlib.compress(bytes((width // 8 + 1) * height), 9)
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", lines), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize("kind", ["pixels", "bytes", "endless"])
def test_an_image_beyond_the_limit_takes_little_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "large.png"
    if kind == "pixels":
        path.write_bytes(_blank(13_000, 13_000))  # Pillow itself would take it, and 1 GB
    elif kind == "bytes":
        with path.open("wb") as file:
            file.truncate(3 * 2**30)  # sparse
    else:
        path = Path("/dev/zero")
    found = refusal("from dist_train.data.image_file import read_image", "read_image(sys.argv[1])", path)
    assert found.kind == "CorruptSampleError", found
    assert "is too large" in found.text and "--max-pixels N" in found.text
    assert found.megabytes < MOST_MEGABYTES


def test_the_limit_is_set_higher_and_lower(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_blank(80, 50))
    assert read_image(tmp_path / "a.png", most_pixels=4000).shape == (3, 50, 80)
    with pytest.raises(CorruptSampleError, match="80 x 50 pixels, where 3,999 pixels are the most"):
        read_image(tmp_path / "a.png", most_pixels=3999)


def test_a_line_is_cut_before_it_is_scaled(tmp_path: Path) -> None:
    """Scaled as a whole, 1 x 60,000 pixels would have 4 billion at 256 pixels."""
    (tmp_path / "line.png").write_bytes(_blank(60_000, 1))
    call = "assert centre(read_image(sys.argv[1]), 224, 224, 256).shape == (3, 224, 224)"
    found = refusal("from dist_train.data.image_file import centre, read_image", call, tmp_path / "line.png")
    assert found.kind == ""
    assert found.megabytes < MOST_MEGABYTES
