"""The factors on the groups' learning rates as a picture: inline SVG, in which what is not significant is grey."""

from __future__ import annotations

import math
from collections.abc import Sequence

from newton_summary.report.charts import Scale
from newton_summary.report.text import escape, number, scrolling, times
from newton_summary.watch.record import Record
from newton_summary.watch.words import DISTINCT, tells

_ROW = 19
_TOP, _BOTTOM, _RIGHT = 24, 44, 24
_PLOT = 420
_LETTER = 6.9  # the width of a letter of a label
_LONGEST = 44
_MOST_DECADES = 6.0  # that the axis spans: what lies beyond is drawn at its ends
_MOST_TICKS = 7
_MOST = 60
_LEAST_SCALE = 0.75  # below which names cannot be read: a narrow screen scrolls


def picture(record: Record) -> str:
    """A row for each group: its factor, and the interval of it.

    Coloured is what the advice speaks of.  The band is around the middle of all factors: within it lies what the noise
    that consecutive steps share may explain.
    """
    rows = shown(record)
    label = max(len(_short(record.names[row])) for row in rows) * _LETTER + 14
    low, high = _ends(record, rows)

    def x(value: float) -> float:
        decade = math.log10(value) if value > 0 else -math.inf
        return label + (min(max(decade, low), high) - low) / (high - low) * _PLOT

    bottom = _TOP + _ROW * len(rows)
    width, height = label + _PLOT + _RIGHT, bottom + _BOTTOM
    marks = [
        *_band(record.middle, x, bottom),
        *(_tick(10.0**power, x, bottom) for power in _powers(low, high)),
        f'<path class="one" d="M{x(1):.1f} {_TOP}V{bottom}"/>',
        f'<text x="{x(1):.1f}" y="{_TOP - 8}" text-anchor="middle">as it is</text>',
        *(_row(record, row, x, _TOP + _ROW * (i + 0.5), label) for i, row in enumerate(rows)),
        f'<text x="{label + _PLOT / 2:.1f}" y="{height - 6}" text-anchor="middle">factor on the learning rate that is '
        "best for the next step</text>",
    ]
    told = "; ".join(f"{record.names[row]}: {times(record.alone[row])}" for row in rows)
    left = f'<p class="note">The {len(rows)} groups that differ most, of {len(record.names)}.</p>'
    style = f"max-width:{width:.0f}px;min-width:{_LEAST_SCALE * width:.0f}px"
    drawn = (
        f'<svg viewBox="0 0 {width:.0f} {height}" style="{style}" role="img" aria-label="{escape(told)}">'
        f"{''.join(marks)}</svg>"
    )
    return (
        '<figure class="chart factors"><figcaption>Factor on each group&#x27;s learning rate, all others standing '
        f"still</figcaption>{scrolling('Factors', drawn)}{left if len(rows) < len(record.names) else ''}</figure>"
    )


def shown(record: Record) -> list[int]:
    """The groups to draw, in their order: all, or those that are spoken of or differ most from the middle."""
    rows = range(len(record.names))
    if len(rows) <= _MOST:
        return list(rows)

    def distance(row: int) -> tuple[bool, float]:
        factor, middle = record.alone[row], record.middle
        known = 0 < factor < math.inf and 0 < middle < math.inf
        return tells(record.words[row]), abs(math.log10(factor / middle)) if known else 0.0

    return sorted(sorted(rows, key=distance, reverse=True)[:_MOST])


def _ends(record: Record, rows: Sequence[int]) -> tuple[float, float]:
    """Where the axis ends, in decades: at the factors and the band, and at intervals as far as there is room."""
    centres = [record.alone[row] for row in rows] + [1.0, record.middle / DISTINCT, record.middle * DISTINCT]
    clear = [math.log10(value) for value in centres if 0 < value < math.inf]
    low, high = min(clear), max(clear)
    wide = [math.log10(v) for row in rows for v in (record.low[row], record.high[row]) if 0 < v < math.inf]
    spare = max(_MOST_DECADES - (high - low), 0.0) / 2
    low, high = max(min([low, *wide]), low - spare), min(max([high, *wide]), high + spare)
    return low - 0.15, high + 0.15


def _powers(low: float, high: float) -> list[int]:
    """The powers of ten to number, 0 among them, no more than there is room for."""
    powers = range(math.ceil(low), math.floor(high) + 1)
    return [power for power in powers if power % -(-len(powers) // _MOST_TICKS) == 0]


def _band(middle: float, x: Scale, bottom: float) -> list[str]:
    if not 0 < middle < math.inf:
        return []
    left, right = x(middle / DISTINCT), x(middle * DISTINCT)
    return [f'<rect class="band" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" height="{bottom - _TOP}"/>']


def _tick(value: float, x: Scale, bottom: float) -> str:
    return (
        f'<path class="grid" d="M{x(value):.1f} {_TOP}V{bottom}"/>'
        f'<text x="{x(value):.1f}" y="{bottom + 15}" text-anchor="middle">{number(value)}×</text>'
    )


def _row(record: Record, row: int, x: Scale, y: float, label: float) -> str:
    """A group: grey unless the advice speaks of it.  An interval's end that is 0 or infinite leaves the picture."""
    name, factor = record.names[row], record.alone[row]
    kind = "telling" if tells(record.words[row]) else "quiet"
    low, high = record.low[row], record.high[row]
    bar = "" if math.isnan(low) else f'<path class="line interval" d="M{x(low):.1f} {y:.1f}H{x(high):.1f}"/>'
    exact = f"{name}: {times(factor)}" + ("" if math.isnan(low) else f" ({number(low, 2)} – {times(high)})")
    return (
        f'<g class="{kind}"><title>{escape(exact)}</title>'
        f'<text x="{label - 10:.1f}" y="{y + 4:.1f}" text-anchor="end">{escape(_short(name))}</text>'
        f'{bar}<circle cx="{x(factor):.1f}" cy="{y:.1f}" r="4.2"/></g>'
    )


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
