"""Tables: for notebooks, what ``_repr_html_`` gives, in which all that comes from outside is escaped; and as text."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

_GREY = "#888"


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: what it says.
        grey: whether it is not significant.
        shade: between −1, blue, and 1, red; 0 is no colour.
    """

    text: str
    grey: bool = False
    shade: float = 0.0


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Cell]], sentences: Sequence[str] = ()) -> str:
    """A table whose first column has names, and sentences below it, in which names stand between backticks.

    Example:
        >>> table("Rates", ("group",), [[Cell("a<b")]])[-42:]
        'text-align: left">a&lt;b</td></tr></table>'
    """
    head = "".join(f"<th>{html.escape(title)}</th>" for title in header)
    body = "".join(f"<tr>{''.join(_cell(cell, n == 0) for n, cell in enumerate(row))}</tr>" for row in rows)
    return f"<table><caption>{html.escape(caption)}</caption><tr>{head}</tr>{body}</table>{listed(sentences)}"


def listed(sentences: Sequence[str]) -> str:
    """A list of sentences, if there are any.

    Example:
        >>> listed(["`a` < `b`"])
        '<ul><li><code>a</code> &lt; <code>b</code></li></ul>'
    """
    said = "".join(f"<li>{sentence(words)}</li>" for words in sentences)
    return f"<ul>{said}</ul>" if said else ""


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of text: the first column to the left, the others to the right.

    Example:
        >>> aligned([("group", "rate"), ("a", "0.01")])
        ['  group  rate', '  a      0.01']
    """
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join(["", name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))])
        for name, *cells in rows
    ]


def _cell(cell: Cell, is_name: bool) -> str:
    style = f"text-align: {'left' if is_name else 'right'}"
    if cell.grey:
        style += f"; color: {_GREY}"
    if round(cell.shade, 2):
        colour = "214, 39, 40" if cell.shade > 0 else "31, 119, 180"
        style += f"; background: rgba({colour}, {min(abs(cell.shade), 1.0) * 0.6:.2f})"
    return f'<td style="{style}">{html.escape(cell.text)}</td>'


def sentence(words: str) -> str:
    """Words in which names stand between backticks, for a page.

    Example:
        >>> sentence("`a<b`: moves 6× less")
        '<code>a&lt;b</code>: moves 6× less'
    """
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(words))
