"""Pieces of HTML; every text that comes from a run is escaped here."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any


class Html(str):
    """Markup that is ready; any other string is a text, to be escaped."""

    __slots__ = ()


def text(value: Any) -> Html:
    """A value as markup: Html as it is, anything else escaped."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def element(name: str, *children: Any, **attributes: str) -> Html:
    """<name ...>children</name>; `class_` stands for class, and underscores for hyphens."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{given}>{''.join(map(text, children))}</{name}>")


def table(headers: Sequence[Any], rows: Sequence[Sequence[Any]], left: int = 1, class_: str = "") -> Html:
    """A table that scrolls by itself where it is too wide; the first `left` columns are texts, the others numbers."""

    def line(cell: str, values: Sequence[Any]) -> Html:
        cells = [
            element(cell, value, class_="text" if place < left else "number") for place, value in enumerate(values)
        ]
        return element("tr", *cells)

    body = [line("td", row) for row in rows]
    made = element("table", element("thead", line("th", headers)), element("tbody", *body), class_=class_)
    return element("div", made, class_="scroll")


def section(title: str, *children: Any) -> Html:
    return element("section", element("h2", title), *children)


def folded(title: Any, *children: Any, opened: bool = False) -> Html:
    made = element("details", element("summary", title), *children)
    return Html(made.replace("<details", "<details open", 1)) if opened else made


def image(png: bytes | str, alt: str, class_: str) -> Html:
    """A PNG, or its base64, within the page."""
    data = png if isinstance(png, str) else base64.b64encode(png).decode()
    return Html(
        f'<img class="{class_}" alt="{html.escape(alt)}" src="data:image/png;base64,{html.escape(data)}" loading="lazy">'
    )
