"""Reads an image file: the one way of training, evaluation and predict."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional

from dist_train.data.jpeg_header import plain_jpeg_size
from dist_train.errors import CorruptSampleError, DataError, escaped, first_line

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp")
"""Extensions of the image files in a folder. A file's content, not its extension, says how it is decoded."""

MOST_PIXELS = 100_000_000
"""The most pixels of an image that is read, where nothing else is said: 10,000 x 10,000, about 1 GB while decoded."""
_MOST_STREAMED = 64 * 2**20  # bytes from a pipe

# Pillow searches them in this order. It knows more formats; some of them start other programs (EPS).
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
CHANNELS = tuple(_MODES)
_ORIENTATION = 0x0112  # EXIF's tag
# Errors that the decoders raise for damaged content. They are many, as Pillow's readers trust the fields of a file.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)
_HINT = "repair or remove the file; in training, leave such files out, counted: --data.on_corrupt skip"
_said: set[str] = set()


def read_image(path: Path | str, channels: int = 3, most_pixels: int = MOST_PIXELS) -> Tensor:
    """Reads an image file as uint8 [channels, H, W], turned upright as its EXIF data says.

    16-bit images are scaled to 8 bits, CMYK is converted, and transparency is dropped unless `channels` is 4. Of an
    animation, the first frame is read, and a warning says so, once in a process.

    channels: 1 (gray), 3 (RGB) or 4 (RGB and alpha).
    most_pixels: limit on width x height, which the file's header gives, and at 2 bytes each on the file's length.

    Raises:
        CorruptSampleError: the file holds no image that can be decoded, is a folder or a link that leads nowhere.
            Or it is beyond `most_pixels`. The message names the file.
        DataError: the file cannot be read.
    """
    content = read_file(path, most_pixels)
    if not content:
        raise CorruptSampleError(f"{path} is empty", _HINT)
    try:
        plain = plain_jpeg_size(content) if channels != 4 else None
        if plain is not None and plain[0] * plain[1] <= most_pixels:
            return _decode_jpeg(content, channels)
        # Our own limit stands in place of Pillow's, which is twice this number.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, most_pixels)
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > most_pixels:
                raise _beyond(path, f"{image.width:,} x {image.height:,} pixels", most_pixels)
            return _decoded(image, content, path, channels)
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+ pixels", first_line(error))
        raise _beyond(path, "a picture" if found is None else found[0], most_pixels) from error
    except UnidentifiedImageError as error:
        reason = "not a JPEG, PNG, GIF, WebP, BMP or TIFF image, or its header is damaged"
        raise CorruptSampleError(f"{path} cannot be decoded: {reason}", _HINT) from error
    except _DAMAGE as error:
        raise CorruptSampleError(f"{path} cannot be decoded: {_reason(error)}", _HINT) from error


def centre(image: Tensor, height: int, width: int, resize: int | None) -> Tensor:
    """Returns an image [C, H, W] as it is evaluated: its shorter edge is scaled, and the centre is cut out.

    resize: length in pixels that the shorter edge is scaled to; None: the image is scaled to height x width, without
        keeping its aspect ratio, and nothing is cut off.
    """
    if resize is None:
        return functional.resize(image, [height, width], antialias=True)
    short, long = sorted(image.shape[1:])
    if resize * resize * long > MOST_PIXELS * short:  # a line: scaled as a whole it would be cut to its centre only
        image = functional.center_crop(image, [min(size, 100 * short) for size in image.shape[1:]])
    return functional.center_crop(functional.resize(image, [resize], antialias=True), [height, width])


def is_image_name(name: str) -> bool:
    """Returns true for the name of a file, without its folder, that a folder of images is searched for."""
    return not name.startswith(".") and name.lower().endswith(EXTENSIONS)


def _reason(error: Exception) -> str:
    """Returns a decoder's reason, without the source file and the line that torchvision puts before it."""
    said = first_line(error)
    return said.rpartition(".cpp:")[2].partition(", ")[2] or said if ".cpp:" in said else said


def _beyond(path: Path | str, size: str, most_pixels: int) -> CorruptSampleError:
    return CorruptSampleError(
        f"{path} is too large: {size}, where {most_pixels:,} pixels are the most",
        "where you trust the file and have the memory: predict --max-pixels N, in training --data.args.max_pixels N; "
        "to leave such files out, counted: --data.on_corrupt skip",
    )


def read_file(path: Path | str, most_pixels: int = MOST_PIXELS) -> bytes:
    """Returns the bytes of an image file; raises as `read_image` does where it cannot be read, or is too long."""
    try:
        with open(path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            regular = stat.S_ISREG(status.st_mode)
            most = 2 * most_pixels + 2**20 if regular else _MOST_STREAMED
            if regular and status.st_size > most:
                raise _beyond(path, f"{status.st_size:,} bytes", most_pixels)
            content = file.readall() if regular else io.BufferedReader(file).read(most + 1)
            if len(content) > most:
                raise _beyond(path, f"more than {most:,} bytes", most_pixels)
            return content
    except IsADirectoryError as error:
        raise CorruptSampleError(f"{path} is a folder, not an image", _HINT) from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path):
            raise CorruptSampleError(f"{path} is a link that leads nowhere: {os.readlink(path)}", _HINT) from error
        raise DataError(f"{path} cannot be read: {error.strerror}", "look at the file, or at the disk") from error


def _decoded(image: Image.Image, content: bytes, path: Path | str, channels: int) -> Tensor:
    if image.format != "MPO" and getattr(image, "is_animated", False):
        _say_first_frame(image.format or "", path)
    # torchvision decodes JPEG faster. Pillow decodes the rest: damaged PNGs crash torchvision's decoder.
    if image.format in ("JPEG", "MPO") and channels != 4:
        pixels = _decode_jpeg(content, channels)
    else:
        pixels = _by_pillow(image, channels)
    # torchvision finds no EXIF data behind other metadata; Pillow does. It turns TIFF images itself, as it loads them.
    return _upright(pixels, _orientation(image))


def _decode_jpeg(content: bytes, channels: int) -> Tensor:
    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=mode)


def _by_pillow(image: Image.Image, channels: int) -> Tensor:
    """Returns pixels [C, H, W], not turned, in the memory format channels_last, in which torchvision scales fast."""
    image.load()
    shown: Image.Image = image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow would clip values above 255. Of 16-bit colours it takes the upper byte. PNGs have no more bits.
        shown = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (Pillow's mode {image.mode}), which have no known scale")
    pixels = np.array(shown.convert(_MODES[channels]))
    return torch.from_numpy(pixels.reshape(shown.height, shown.width, channels)).permute(2, 0, 1)


def _orientation(image: Image.Image) -> int:
    """Returns EXIF's orientation, 1 to 8; 1 where there is none, or where the EXIF data are damaged."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except _DAMAGE:
        return 1
    return found if found in range(1, 9) else 1


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Turns pixels [C, H, W] that were stored with an EXIF orientation (EXIF 2.32, section 4.6.4 A)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    flipped = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation, [])
    return pixels.flip(flipped) if flipped else pixels


def _say_first_frame(format: str, path: Path | str) -> None:
    if format not in _said:
        _said.add(format)
        warnings.warn(
            f"{escaped(str(path))} has several frames: the first is read, of this and of other such {format} files",
            stacklevel=4,
        )
