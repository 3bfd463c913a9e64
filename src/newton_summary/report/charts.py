"""Line charts as inline SVG, coloured by the page's style sheet, so that they suit light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from newton_summary.report.text import escape, number

_HEIGHT = 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 8, 38
_MOST_POINTS = 400
_DOT = 6


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Args:
        name: what it shows.
        points: (x, y); a y of ``None``, or one that has no place on the axis, leaves a gap.
        colour: a CSS colour.
        dashed: whether it is dashed.
        ends_in_cross: whether its end is marked: a run that diverged.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: str
    dashed: bool = False
    ends_in_cross: bool = False


def chart(
    title: str, x_label: str, y_label: str, lines: Sequence[Line], width: int = 360, *, signed: bool = False
) -> str:
    """A figure whose title is read out, and so is what each line ends at.

    The y axis is logarithmic; of what is ``signed`` only where all of it is above 0.
    """
    heights = [y for line in lines for _, y in line.points if y is not None and math.isfinite(y)]
    is_linear = signed and min(heights, default=1.0) <= 0
    heights = [y for y in heights if is_linear or y > 0]
    if not heights:
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p>Nothing to draw.</p></figure>'
    x_ticks, x = _linear([p[0] for line in lines for p in line.points], width)
    y_ticks, y = _upwards(heights) if is_linear else _logarithmic(heights)
    marks = [
        _x_axis(x_ticks, x, x_label, width),
        _y_axis({t: number(t, 5) if is_linear else _power(t) for t in y_ticks}, y, y_label, width),
        *(_path(line, x, y, -math.inf if is_linear else 0.0) for line in lines),
    ]
    ends = "; ".join(f"{line.name}: {_end(line)}" for line in lines)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {width} {_HEIGHT}" role="img" aria-label="{escape(f"{title}. At the end: {ends}")}">'
        f"{''.join(marks)}</svg></figure>"
    )


def legend(lines: Sequence[Line]) -> str:
    """The names of lines, each with a piece of its line."""
    items = (
        f'<li><svg class="swatch" viewBox="0 0 28 8" aria-hidden="true"><path d="M0 4H28" {_stroke(line)}/></svg>'
        f"{escape(line.name)}</li>"
        for line in lines
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


Scale = Callable[[float], float]


def _linear(values: Sequence[float], width: int) -> tuple[list[float], Scale]:
    """Ticks at round numbers from 0 on, and where a number lies across the chart."""
    high = max(*values, 1e-9)
    return _round_numbers(0.0, high), lambda value: _LEFT + value / high * (width - _LEFT - _RIGHT)


def _upwards(values: Sequence[float]) -> tuple[list[float], Scale]:
    """Ticks at round numbers, and how far down a number of any sign lies."""
    low, high = min(values), max(values)
    margin = max(0.04 * (high - low), 1e-3 * max(abs(low), abs(high)), 1e-9)
    low, high = low - margin, high + margin
    return _round_numbers(low, high), lambda value: _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _logarithmic(values: Sequence[float]) -> tuple[list[float], Scale]:
    """Ticks at powers of ten, or at round numbers where there is hardly one; and how far down a number lies."""
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.04 * (high - low), 0.05)
    low, high = low - margin, high + margin
    powers = range(math.ceil(low), math.floor(high) + 1)
    if len(powers) >= 2:
        ticks = [10.0**power for power in powers[:: -(-len(powers) // 6)]]
    else:
        ticks = [tick for tick in _round_numbers(10**low, 10**high) if tick > 0]
    return ticks, lambda value: _TOP + (high - math.log10(value)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _round_numbers(low: float, high: float) -> list[float]:
    """Three to seven multiples of a round number in an interval."""
    power = 10 ** math.floor(math.log10(high - low))
    step = next(power * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if (high - low) / (power * part) <= 6)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _x_axis(ticks: Sequence[float], x: Scale, label: str, width: int) -> str:
    bottom = _HEIGHT - _BOTTOM
    marks = [
        f'<path class="grid" d="M{x(t):.1f} {_TOP}V{bottom}"/>'
        f'<text x="{x(t):.1f}" y="{bottom + 15}" text-anchor="middle">{number(t)}</text>'
        for t in ticks
    ]
    middle = (_LEFT + width - _RIGHT) / 2
    return f'{"".join(marks)}<text x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(label)}</text>'


def _y_axis(ticks: Mapping[float, str], y: Scale, label: str, width: int) -> str:
    marks = [
        f'<path class="grid" d="M{_LEFT} {y(t):.1f}H{width - _RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{words}</text>'
        for t, words in ticks.items()
    ]
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    turned = f'transform="translate(12 {middle}) rotate(-90)"'
    return f'{"".join(marks)}<text {turned} text-anchor="middle">{escape(label)}</text>'


def _power(value: float) -> str:
    """A power of ten with a raised exponent, other numbers as they are."""
    power = math.log10(value)
    if abs(power - round(power)) > 1e-9 or -2 <= round(power) <= 3:
        return number(value)
    return number(value).removeprefix("1×")


def _path(line: Line, x: Scale, y: Scale, above: float) -> str:
    """Pieces between gaps, where a height is not above a bound; a point between two gaps becomes a dot.

    It does so by the round ends of a line of no length, which is thick enough to be seen.
    """
    every = -(-len(line.points) // _MOST_POINTS)
    points = [*line.points[:-1:every], *line.points[-1:]]
    pieces: list[list[str]] = [[]]
    for at, height in points:
        if height is not None and above < height < math.inf:
            pieces[-1].append(f"{x(at):.1f} {y(height):.1f}")
        else:
            pieces.append([])
    lines = "".join(f"M{'L'.join(piece)}" for piece in pieces if len(piece) > 1)
    dots = "".join(f"M{piece[0]}h0" for piece in pieces if len(piece) == 1)
    marks = f'<path d="{dots}" class="line" style="stroke:{line.colour};stroke-width:{_DOT}"/>' if dots else ""
    cross = ""
    last = next(((at, h) for at, h in reversed(line.points) if h is not None and above < h < math.inf), None)
    if line.ends_in_cross and last is not None:
        cross = f'<path d="M{x(last[0]) - 4:.1f} {y(last[1]) - 4:.1f}l8 8m0 -8l-8 8" style="stroke:{line.colour}"/>'
    return f'<path d="{lines}" {_stroke(line)}><title>{escape(line.name)}</title></path>{marks}{cross}'


def _stroke(line: Line) -> str:
    dashes = ' stroke-dasharray="5 3.5"' if line.dashed else ""
    return f'class="line" style="stroke:{line.colour}"{dashes}'


def _end(line: Line) -> str:
    return number(line.points[-1][1]) if line.points else "–"
