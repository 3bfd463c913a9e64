"""Rates and losses over training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from newton_summary.plots.parts import SERIES, Axes, Figure, MaxNLocator, colormaps, is_bias, layer, quiet

_MOST_IN_LEGEND = 24


def rates(
    history: Mapping[str, Sequence[float]],
    ax: Axes | None = None,
    *,
    steps: Sequence[float] | None = None,
    title: str = "Learning rate of every group",
) -> Axes:
    """Every group's rate over training, on a logarithmic scale.

    Colour goes from the first layers (dark) to the last (light); weights are solid, biases dashed.  A logarithmic scale
    has no place for rates that are 0: each group has a row for them in the grey band at the foot.

    Args:
        history: for each group its rates, in the order of the model.
        ax: where to draw.  Default: a new figure.
        steps: the step of each rate.  Default: 0, 1, 2 and so on.
        title: of the panel.

    Raises:
        ValueError: the groups have not equally many rates, or there are none.

    Example:
        >>> rates({"layer.weight": [1e-3, 2e-3], "layer.bias": [1e-1, 0.0]}).get_yscale()
        'log'
    """
    lengths = {len(values) for values in history.values()}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"rates need equally many values for every group, at least one; got {sorted(lengths)}")
    ax = ax or Figure(figsize=(8.0, 4.5), layout="constrained").subplots()
    x = list(range(lengths.pop())) if steps is None else list(steps)
    layers = list(dict.fromkeys(layer(name) for name in history))
    colour = {name: colormaps["viridis"](0.85 * i / max(len(layers) - 1, 1)) for i, name in enumerate(layers)}
    for name, values in history.items():
        shown = [value if value > 0 else math.nan for value in values]
        alone = [i for i, value in enumerate(values) if value > 0 and not _has_neighbour(values, i)]
        style = "--" if is_bias(name) else "-"
        (line,) = ax.plot(x, shown, style, label=name, linewidth=1.3, color=colour[layer(name)])
        line.set(marker="." if alone else "None", markevery=alone or None, markersize=3)  # which no line leads to
    ax.set_yscale("log")
    _draw_zeros(ax, x, history, colour)
    ax.set_ylabel("rate η")
    ax.set_xlabel("step")
    ax.set_title(title)
    quiet(ax)
    if len(history) <= _MOST_IN_LEGEND:
        words = "solid: weights\ndashed: biases"
        anchor = (1.03, 0.5)
        small = {"fontsize": 8, "title_fontsize": 8, "handlelength": 3}
        ax.legend(loc="center left", bbox_to_anchor=anchor, frameon=False, title=words, **small)
    return ax


def _has_neighbour(values: Sequence[float], i: int) -> bool:
    """Whether the value before or after is above 0."""
    return any(value > 0 for value in [*values[max(i - 1, 0) : i], *values[i + 1 : i + 2]])


def stack(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels, one above the other, each fit for :func:`rates`."""
    figure = Figure(figsize=(8.0, 4.5 * count), layout="constrained")
    return figure, [figure.add_subplot(count, 1, number + 1) for number in range(count)]


def curves(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], title: str = "") -> Figure:
    """Training loss against epochs and against seconds, on a logarithmic scale.

    Args:
        runs: for each optimizer its runs, one for each seed; a run is a sequence of rows with ``epoch``, ``seconds``
            and ``train_loss`` (``None`` where it is not finite), as in ``metrics.jsonl``.  A run that
            diverged ends in ×.
        title: above both panels.
    """
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for ax, key, label in zip(panels, ("epoch", "seconds"), ("epoch", "seconds of training"), strict=True):
        for number, (name, repeats) in enumerate(runs.items()):
            colour = SERIES[number % len(SERIES)]
            for repeat, rows in enumerate(repeats):
                points = [(row[key], row["train_loss"]) for row in rows if row["train_loss"] is not None]
                xs, ys = [p[0] for p in points], [p[1] for p in points]
                ax.plot(xs, ys, color=colour, linewidth=1.5, alpha=0.9, label=None if repeat else name)
                if rows[-1].get("diverged") and points:
                    ax.plot(xs[-1], ys[-1], "x", color=colour, markersize=9, markeredgewidth=2)
        ax.set_yscale("log")
        ax.set_xlabel(label)
        quiet(ax)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("training loss")
    panels[0].legend(frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def _draw_zeros(
    ax: Axes, x: Sequence[float], history: Mapping[str, Sequence[float]], colour: Mapping[str, Any]
) -> None:
    """A band below the smallest rate, with a row of marks for every group that has rates of 0."""
    names = [name for name, values in history.items() if any(value == 0 for value in values)]
    if not names:
        return
    positive = [math.log10(value) for values in history.values() for value in values if value > 0]
    low, high = min(positive, default=0.0), max(positive, default=0.0)
    row = max(high - low, 0.5) * 0.3 / max(len(names), 8)
    top = low - row
    for number, name in enumerate(names, start=1):
        zeros = [t for t, value in zip(x, history[name], strict=True) if value == 0]
        ax.plot(zeros, [10 ** (top - number * row)] * len(zeros), "|", color=colour[layer(name)], markersize=4)
    bottom = top - (len(names) + 1) * row
    ax.axhspan(10**bottom, 10**top, color="0.93", zorder=0)
    ax.annotate(
        " rate 0", (1.0, 10 ** ((top + bottom) / 2)), xycoords=("axes fraction", "data"), va="center", fontsize=8
    )
    ax.set_ylim(10**bottom, 10 ** (high + row))
    for minor in (False, True):
        ax.set_yticks([tick for tick in ax.get_yticks(minor=minor) if 10**top < tick < 10 ** (high + row)], minor=minor)
