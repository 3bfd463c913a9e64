"""Pictures of summaries and of training runs; they need the extra ``plots``.

Nothing global is touched: no ``pyplot``, no backend, no style.  A function that draws one panel takes its axes and
returns them; without axes it draws into a figure of its own, ``ax.figure``, which ``ax.figure.savefig(path)`` writes.
Colours can be told apart with every common kind of colour blindness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from newton_summary.summary import Summary

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize, SymLogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:  # pragma: no cover - a test runs it in a process of its own
    raise ImportError("plots need matplotlib: pip install 'newton-summary[plots]'") from error

__all__ = ["curves", "heatmap", "interactions", "rates", "stack"]

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours for lines: the palette of Okabe and Ito, darkest first."""

_DECADES = 4.0
_MOST_LABELS = 40
_MOST_IN_LEGEND = 24


def heatmap(summary: Summary, ax: Axes | None = None, title: str = "H̄") -> Axes:
    """H̄ as a signed heatmap, with the groups' names, on a colour scale that is symmetric about 0.

    Where entries span more than 1.5 decades, the scale is logarithmic but for a linear part about 0, four decades below
    the largest entry; the colour bar says so.

    Args:
        summary: S groups, with H̄.
        ax: where to draw.  Default: a new figure.
        title: of the panel.

    Raises:
        ValueError: the summary has no H̄.

    Example:
        >>> summary = Summary(loss=1.0, gradient=[1.0, 0.5], hessian=[[2.0, -0.1], [-0.1, 1.0]], names=["body", "head"])
        >>> heatmap(summary).get_title()
        'H̄'
    """
    hessian = summary.tensor(2).detach().cpu()
    ax = ax or Figure(figsize=(6.0, 5.2), layout="constrained").subplots()
    _draw_matrix(ax, hessian, summary.names, "units of the loss")
    ax.set_title(title)
    return ax


def interactions(summary: Summary, title: str = "") -> Figure:
    """H̄ and H̄⁻¹ side by side, in blocks: weights with weights, weights with biases, biases with biases.

    Groups stand in the order of the model within each kind; groups whose name ends in ``bias`` or ``biases`` are
    biases.  Scales are those of :func:`heatmap`.

    Args:
        summary: with H̄.
        title: above both panels.

    Raises:
        ValueError: the summary has no H̄.
    """
    hessian = summary.tensor(2).detach().cpu()
    biases = [_is_bias(name) for name in summary.names]
    order = sorted(range(len(summary)), key=lambda i: biases[i])
    first_bias = biases.count(False)
    split = 0 < first_bias < len(order)
    names = [_layer(summary.names[i]) if split else summary.names[i] for i in order]
    figure = Figure(figsize=(11.0, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    panels = (
        (left, "H̄", hessian, "units of the loss"),
        (right, "H̄⁻¹", _inverse(hessian), "1 / units of the loss"),
    )
    for ax, name, matrix, unit in panels:
        if matrix is None:
            ax.set_axis_off()
            ax.text(0.5, 0.5, "H̄ has no inverse:\nit is singular or not finite", ha="center", va="center")
            continue
        _draw_matrix(ax, matrix[order][:, order], names, unit)
        ax.set_title(name, pad=18 if split else 6)
        if split:
            _separate_blocks(ax, first_bias, len(order))
    if title:
        figure.suptitle(title)
    return figure


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
    layers = list(dict.fromkeys(_layer(name) for name in history))
    colour = {name: colormaps["viridis"](0.85 * i / max(len(layers) - 1, 1)) for i, name in enumerate(layers)}
    for name, values in history.items():
        shown = [value if value > 0 else math.nan for value in values]
        marker = "" if all(value > 0 for value in values) else "."  # a rate between two zeros has no line to it
        line = "--" if _is_bias(name) else "-"
        ax.plot(x, shown, line, marker=marker, markersize=3, label=name, linewidth=1.3, color=colour[_layer(name)])
    ax.set_yscale("log")
    _draw_zeros(ax, x, history, colour)
    ax.set_ylabel("rate η")
    ax.set_xlabel("step")
    ax.set_title(title)
    _quiet(ax)
    if len(history) <= _MOST_IN_LEGEND:
        words = "solid: weights\ndashed: biases"
        anchor = (1.03, 0.5)
        ax.legend(loc="center left", bbox_to_anchor=anchor, fontsize=7, frameon=False, title=words, title_fontsize=7)
    return ax


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
        _quiet(ax)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("training loss")
    panels[0].legend(frameon=False)
    if title:
        figure.suptitle(title)
    return figure


# Parts ----------------------------------------------------------------------------------------------------------------


def _draw_matrix(ax: Axes, values: torch.Tensor, names: Sequence[str], unit: str) -> None:
    """A square matrix as a heatmap, with names on both axes and a colour bar."""
    norm, scale = _signed_scale(values)
    cmap = colormaps["RdBu_r"].with_extremes(bad="0.6")
    image = ax.imshow(values.numpy(), cmap=cmap, norm=norm, interpolation="nearest", aspect="equal")
    _label_groups(ax, names)
    figure = ax.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(image, ax=ax, shrink=0.85)
    if isinstance(norm, SymLogNorm):
        bar.set_ticks(_signed_decades(norm), minor=False)
    bar.set_label(f"{unit}, {scale} scale", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _signed_scale(values: torch.Tensor) -> tuple[Normalize, str]:
    """A colour scale that is symmetric about 0, and its name."""
    sizes = values.abs()[values.isfinite() & (values != 0)]
    if not len(sizes):
        return Normalize(-1.0, 1.0), "linear"
    top = float(sizes.max())
    if float(sizes.quantile(0.25)) > top * 10**-1.5:
        return Normalize(-top, top), "linear"
    threshold = max(top * 10**-_DECADES, float(sizes.min()))
    return SymLogNorm(threshold, linscale=0.5, vmin=-top, vmax=top, base=10), "symmetric logarithmic"


def _signed_decades(norm: SymLogNorm) -> list[float]:
    """Ticks at 0 and at powers of ten of both signs, down to just above the linear part."""
    top = math.floor(math.log10(norm.vmax or 1.0))
    bottom = math.ceil(math.log10(3 * norm.linthresh))
    powers = [10.0**k for k in range(min(bottom, top), top + 1)]
    return [*(-p for p in reversed(powers)), 0.0, *powers]


def _label_groups(ax: Axes, names: Sequence[str]) -> None:
    """Names along both axes, as large as there is room for; every k-th where there are too many."""
    stride = -(-len(names) // _MOST_LABELS)
    positions = range(0, len(names), stride)
    size = max(4.5, min(9.0, 240 / max(len(positions), 1)))
    shown = [names[i] for i in positions]
    ax.set_xticks(positions, shown, rotation=90, fontsize=size)
    ax.set_yticks(positions, shown, fontsize=size)
    ax.tick_params(length=2)


def _separate_blocks(ax: Axes, first_bias: int, count: int) -> None:
    """A line between weights and biases, and the names of both at the edges."""
    ax.axhline(first_bias - 0.5, color="black", linewidth=0.8)
    ax.axvline(first_bias - 0.5, color="black", linewidth=0.8)
    for name, start, stop in (("weights", 0, first_bias), ("biases", first_bias, count)):
        middle = (start + stop) / 2 / count
        ax.annotate(name, (middle, 1.01), xycoords="axes fraction", ha="center", va="bottom", fontsize=8)
        ax.annotate(
            name, (1.01, 1 - middle), xycoords="axes fraction", ha="left", va="center", fontsize=8, rotation=270
        )


def _inverse(matrix: torch.Tensor) -> torch.Tensor | None:
    """The inverse after a scaling to a unit diagonal, or ``None`` where there is none in float64."""
    scale = matrix.abs().amax(1).sqrt()
    if not bool(matrix.isfinite().all()) or bool((scale == 0).any()):
        return None
    scaled = matrix / scale / scale[:, None]
    if float(torch.linalg.cond(scaled)) > 1e14:
        return None
    inverse: torch.Tensor = torch.linalg.inv(scaled) / scale / scale[:, None]
    return inverse


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] in ("bias", "biases")


def _layer(name: str) -> str:
    """The name of a group's layer: ``conv1`` for ``conv1.weight``."""
    owner, _, last = name.rpartition(".")
    return owner if owner and last in ("weight", "weights", "bias", "biases") else name


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
        ax.plot(zeros, [10 ** (top - number * row)] * len(zeros), "|", color=colour[_layer(name)], markersize=4)
    bottom = top - (len(names) + 1) * row
    ax.axhspan(10**bottom, 10**top, color="0.93", zorder=0)
    ax.annotate(
        " rate 0", (1.0, 10 ** ((top + bottom) / 2)), xycoords=("axes fraction", "data"), va="center", fontsize=8
    )
    ax.set_ylim(10**bottom, 10 ** (high + row))
    for minor in (False, True):
        ax.set_yticks([tick for tick in ax.get_yticks(minor=minor) if 10**top < tick < 10 ** (high + row)], minor=minor)


def _quiet(ax: Axes) -> None:
    ax.grid(True, which="major", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
