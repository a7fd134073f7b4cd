"""Draws boxes on pictures."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

COLOURS = ("#dc2626", "#2563eb", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")


def mark(image: Image.Image, boxes: Sequence[tuple[int, Sequence[float], str]], colour: str | None = None) -> None:
    """Draws boxes on an image, in place.

    Args:
        boxes: class, corners x1, y1, x2, y2 in pixels, and what stands beside; "" for nothing.
        colour: of all; None: one for each class.
    """
    pen = ImageDraw.Draw(image)
    width = max(1, round(min(image.size) / 160))
    for number, (left, top, right, bottom), text in boxes:
        own = colour or COLOURS[number % len(COLOURS)]
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=own, width=width)
        if text:
            place = pen.textbbox((left, max(0.0, top - 11)), text)
            pen.rectangle(place, fill=own)
            pen.text(place[:2], text, fill="white")
