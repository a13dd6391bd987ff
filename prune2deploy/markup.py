"""HTML that cannot be broken by a value: all text is escaped unless it is ``Html`` already; and numbers in words."""

from collections.abc import Sequence
from html import escape

_VOID = {"meta"}


class Html(str):
    """Text that is HTML; any other text is escaped when it is put into a tag."""

    __slots__ = ()


def tag(element: str, /, *content: object, **attributes: str) -> Html:
    """Return an element; ``class_`` and ``http_equiv`` are written as HTML has them."""
    named = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    inner = "".join(part if isinstance(part, Html) else escape(str(part)) for part in content)
    return Html(f"<{element}{named}>" if element in _VOID else f"<{element}{named}>{inner}</{element}>")


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: bool = False) -> Html:
    """Return a table that scrolls sideways by itself; with ``numbers``, all columns but the first are set right."""
    style = {"class_": "number"} if numbers else {}
    lines = [
        tag("tr", *(tag("th", cell, **({} if place == 0 else style)) for place, cell in enumerate(head))),
    ]
    body = [
        tag(
            "tr",
            tag("th", row[0], class_="name"),
            *(tag("td", "–" if cell is None else cell, **style) for cell in row[1:]),
        )
        for row in rows
    ]
    parts = [tag("thead", *lines)] if head else []
    return tag("div", tag("table", *parts, tag("tbody", *body)), class_="scroll")


def card(title: str, note: str, *content: Html | None) -> Html:
    """Return a titled box with a note (none if it is empty) and its content; what is None is left out."""
    parts = [part for part in content if part is not None]
    return tag("div", tag("h3", title), *([tag("p", note, class_="soft small")] if note else []), *parts, class_="card")


def banner(kind: str, title: str, text: str) -> Html:
    """Return a line that must not be overlooked; ``kind`` is ``good``, ``warn`` or ``bad``."""
    return tag("div", tag("strong", title), text, class_=f"banner {kind}", role="status")


def tile(label: str, value: str, note: str) -> Html:
    """Return one number in large letters, with what it is."""
    return tag(
        "div",
        tag("div", label, class_="soft small"),
        tag("div", value, class_="value"),
        tag("div", note, class_="soft small"),
        class_="tile",
    )


def figure_place(identifier: str, height: int) -> Html:
    """Return where the figure of that identifier will be drawn, as high as it will be (in pixels)."""
    return tag("div", id=identifier, class_="figure", style=f"min-height:{height}px")


def count_text(value: float | None) -> str:
    """Return a count in words: 950, 12,345, 1.23 M, 4.56 G."""
    if value is None:
        return "–"
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,.0f}"


def bytes_text(value: float | None) -> str:
    """Return a size in words: 950 B, 12.3 KiB, 4.56 MiB."""
    if value is None:
        return "–"
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def ms_text(value: float | None) -> str:
    """Return milliseconds with four significant digits."""
    return "–" if value is None else f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def percent_text(share: float | None) -> str:
    """Return a share as a percentage with two decimals."""
    return "–" if share is None else f"{100 * share:.2f} %"


def share_text(share: float | None) -> str:
    """Return what is left as a rounded percentage."""
    return "–" if share is None else f"{100 * share:.3g} %"
