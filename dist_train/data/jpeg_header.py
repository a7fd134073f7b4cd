"""Reads the header of a plain JPEG, which has nothing that only Pillow understands: Pillow itself takes longer."""

from __future__ import annotations

_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: all with Huffman codes
# Tables, restart interval, comment and JFIF. EXIF, XMP, several pictures and other colours lie in other segments.
_PLAIN = (0xC4, 0xDB, 0xDD, 0xFE, 0xE0)
_SCAN = 0xDA


def plain_jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Returns height and width of a plain JPEG, gray or in three colours; None for any other file, or a damaged header.

    The segments are those of ITU-T T.81, annex B: FF, a code, a length that counts itself, that many bytes.
    """
    if content[:2] != b"\xff\xd8":
        return None
    place, size = 2, None
    while content[place : place + 1] == b"\xff" and len(content) > place + 9:
        code = content[place + 1]
        if code == _SCAN:
            return size
        if code in _FRAMES:
            height, width = (int.from_bytes(content[place + at : place + at + 2], "big") for at in (5, 7))
            if size is not None or content[place + 4] != 8 or content[place + 9] not in (1, 3) or not height * width:
                return None
            size = height, width
        elif code not in _PLAIN:
            return None
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return None
