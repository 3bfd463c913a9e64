"""Words and tables for a page: everything that comes from outside is escaped here."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence


def escape(value: object) -> str:
    """Text that is safe anywhere in a page, in attributes too."""
    return html.escape(str(value), quote=True)


def code(name: object) -> str:
    """The name of a group or of a file."""
    return f"<code>{escape(name)}</code>"


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits and a true minus; a dash for what is unknown.

    Example:
        >>> [number(x) for x in (-0.01234, 1234.0, 123456.0, 2.5e-7, float("inf"), None)]
        ['−0.0123', '1,230', '1.23×10⁵', '2.5×10⁻⁷', '∞', '–']
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    if 1e-3 <= abs(value) < 1e5:
        shown = f"{round(value, decimals):,.{max(decimals, 0)}f}"
        return (shown.rstrip("0").rstrip(".") if "." in shown else shown).replace("-", "−")
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{float(mantissa):g}×10{raised}".replace("-", "−")


def signed(value: float) -> str:
    """A correlation, with its sign.

    Example:
        >>> signed(0.5), signed(-0.123), signed(0.001)
        ('+0.50', '−0.12', '0.00')
    """
    shown = f"{value:+.2f}"
    return shown[1:] if float(shown) == 0 else shown.replace("-", "−")


def percent(share: float, decimals: int = 1) -> str:
    """A share in percent."""
    return f"{100 * share:.{decimals}f} %"


def times(factor: float) -> str:
    """A factor."""
    return "–" if math.isnan(factor) else f"{number(factor, 2)}×"


def interval(low: float, high: float) -> str:
    """Both ends of an interval of factors."""
    return "–" if math.isnan(low) else f"{number(low, 2)} – {number(high, 2)}×"


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A table whose first column names the rows.  All cells are HTML.

    Args:
        caption: what the table shows.
        header: the names of the columns.
        rows: as many cells in each.
        numbers: the columns to set flush right.
    """
    kind = ['class="number"' if i in numbers else "" for i in range(len(header))]
    head = "".join(f'<th scope="col" {kind[i]}>{name}</th>' for i, name in enumerate(header))
    body = "".join(
        f'<tr><th scope="row">{first}</th>'
        + "".join(f"<td {kind[i]}>{cell}</td>" for i, cell in enumerate(rest, start=1))
        + "</tr>\n"
        for first, *rest in rows
    )
    return scrolling(caption, f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead>\n{body}</table>")


def scrolling(name: str, content: str) -> str:
    """What may be wider than a narrow screen, in a box of its own that the keyboard can scroll."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{_plain(name)}">{content}</div>'


def quiet(content: str) -> str:
    """What is not significant, in grey."""
    return f'<span class="quiet">{content}</span>'


def folded(title: str, content: str) -> str:
    """Something that is shown when asked for."""
    return f"<details><summary>{title}</summary>{content}</details>"


def _plain(markup: str) -> str:
    """The text of some markup, fit for an attribute."""
    return escape(html.unescape(re.sub(r"<[^>]*>", "", markup)))
