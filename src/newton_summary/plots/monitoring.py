"""What a monitor saw: decreases of the loss, the loss along a group's direction, the strongest interactions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from newton_summary.plots.parts import SERIES, Axes, colormaps, new_axes, quiet, signed_decades
from newton_summary.summary import Summary
from newton_summary.watch.advice import alone
from newton_summary.watch.advice import correlations as correlations_of

if TYPE_CHECKING:
    from newton_summary.watch.record import Record

BLUE, ORANGE, GREEN = SERIES[:3]


def decreases(
    records: Iterable[Record], ax: Axes | None = None, title: str = "Decrease of the loss in one step"
) -> Axes:
    """What the quadratic model predicted of each step against what the loss then did, on the same batches.

    On the line both agree.  Colour goes from the first record (dark) to the last (light).  Both axes are logarithmic
    but for a linear part about 0, where they span more than two decades.

    Args:
        records: a monitor's; those whose step was not taken are left out.
        ax: where to draw.  Default: a new figure.
        title: of the panel.

    Raises:
        ValueError: no record has both decreases.
    """
    points = [
        (record.step, record.predicted_decrease, record.actual_decrease)
        for record in records
        if math.isfinite(record.predicted_decrease) and math.isfinite(record.actual_decrease)
    ]
    if not points:
        raise ValueError("no record has an actual decrease yet: it is known after the optimizer's step")
    ax = ax or new_axes(5.6, 4.6)
    steps, predicted, actual = ([point[i] for point in points] for i in range(3))
    low, high = min(*predicted, *actual, 0.0), max(*predicted, *actual, 0.0)
    ax.plot([low, high], [low, high], color="0.6", linewidth=1.0, zorder=1)
    drawn = ax.scatter(predicted, actual, c=steps, cmap=colormaps["viridis"], s=22, alpha=0.9, linewidths=0, zorder=2)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.colorbar(drawn, ax=ax, label="step", shrink=0.85)
    ax.set_xlabel("predicted by the quadratic model")
    ax.set_ylabel("actual")
    ax.set_title(title)
    quiet(ax)
    _stretch(ax, predicted + actual)
    if ax.get_xscale() == "linear":
        ax.locator_params("x", nbins=5)  # more of their numbers would run into each other
    return ax


def loss_along(
    summary: Summary,
    group: str,
    factors: Sequence[float] | Tensor,
    losses: Sequence[float] | Tensor,
    ax: Axes | None = None,
) -> Axes:
    """The loss along one group's direction: the true curve, and its second- and third-order models over it.

    Dotted lines stand at the factors 0 and 1, the point where the loss was measured and the optimizer's own step; the
    diamond is the advice, the minimum of the cubic model where it is in sight.

    Args:
        summary: of the loss that the curve is of, with H̄.
        group: the name of the group.
        factors: how many of the optimizer's steps the group takes, shape (n,).
        losses: the loss there, shape (n,): a row of :func:`newton_summary.measure.along.losses_along`.
        ax: where to draw.  Default: a new figure.

    Raises:
        ValueError: the group is unknown, or there are not as many losses as factors.
    """
    if group not in summary.names:
        raise ValueError(f"no group is called {group!r}: the groups are {', '.join(summary.names)}")
    x, y = (torch.as_tensor(values, dtype=torch.float64).detach().cpu() for values in (factors, losses))
    if x.shape != y.shape or x.dim() != 1:
        raise ValueError(f"{tuple(x.shape)} factors and {tuple(y.shape)} losses: give as many of both")
    ax = ax or new_axes(5.0, 3.6)
    number, host = summary.names.index(group), summary.cpu()
    dense = torch.linspace(float(x.min()), float(x.max()), 200, dtype=torch.float64)
    quadratic = host.loss - host.gradient[number] * dense + host.tensor(2)[number, number] * dense**2 / 2
    ax.plot(x.tolist(), y.tolist(), color="black", linewidth=3.0, alpha=0.35, label="loss")
    ax.plot(dense.tolist(), quadratic.tolist(), "--", color=BLUE, linewidth=1.5, label="second order")
    third = host.third_diagonal
    if third is not None:
        cubic = quadratic - third[number] * dense**3 / 6
        ax.plot(dense.tolist(), cubic.tolist(), "-.", color=ORANGE, linewidth=1.5, label="third order")
    advised = float(alone(host)[number])
    if float(x.min()) <= advised <= float(x.max()):
        ax.plot(advised, _interpolate(x, y, advised), "D", color=GREEN, markersize=6, label="advised", zorder=3)
    for at in (0.0, 1.0):
        ax.axvline(at, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    finite = y[y.isfinite()]
    if len(finite):  # the models may leave; the true curve decides what is seen
        margin = 0.35 * (max(float(finite.max() - finite.min()), 1e-12 * abs(float(finite.max()))) or 1.0)
        ax.set_ylim(float(finite.min()) - margin, float(finite.max()) + margin)
    ax.set_title(group, fontsize=10)
    ax.set_xlabel("factor on the group's step")
    ax.set_ylabel("loss")
    quiet(ax)
    ax.legend(frameon=False, fontsize=8)
    return ax


def strongest(
    summary: Summary, ax: Axes | None = None, *, count: int = 20, title: str = "Strongest interactions"
) -> Axes:
    """The pairs of groups with the largest |H̄_ij| / √|H̄_ii H̄_jj|, ranked, as bars.

    Blue to the right: the two pull against each other, each one's step makes the other's best step shorter.  Orange to
    the left: they help each other.

    Args:
        summary: S groups, with H̄.
        ax: where to draw.  Default: a new figure.
        count: the most pairs to show.
        title: of the panel.

    Raises:
        ValueError: the summary has no H̄, or just one group.
    """
    if len(summary) < 2:
        raise ValueError("one group has nothing to interact with")
    matrix = correlations_of(summary.cpu())
    rows, columns = torch.triu_indices(len(summary), len(summary), offset=1)
    values = matrix[rows, columns].nan_to_num()
    chosen = values.abs().argsort(descending=True, stable=True)[:count].tolist()
    ax = ax or new_axes(7.0, 1.4 + 0.24 * len(chosen))
    shown = [float(values[i]) for i in chosen]
    names = [f"{summary.names[int(rows[i])]} × {summary.names[int(columns[i])]}" for i in chosen]
    ax.barh(range(len(shown)), shown, color=[BLUE if value > 0 else ORANGE for value in shown], height=0.7)
    ax.axvline(0.0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    largest = max(map(abs, shown)) or 1.0  # none interacts
    left = -1.05 * largest if min(shown) < 0 else 0.0
    ax.set_xlim(left, 1.05 * largest if max(shown) > 0 or not left else 0.0)
    ax.set_xlabel("> 0: each makes the other's best step shorter;  < 0: longer;  1: the same work", fontsize=8)
    ax.set_title(title)
    quiet(ax)
    return ax


def _stretch(ax: Axes, values: Sequence[float]) -> None:
    """Makes both axes logarithmic but for a linear part about 0, where values span more than two decades."""
    sizes = sorted(abs(value) for value in values if value)
    if not sizes or sizes[-1] <= 100 * sizes[0]:
        return
    threshold = max(sizes[0], sizes[-1] * 1e-4)
    ticks = signed_decades(sizes[-1], threshold)
    negative = min(values) < 0
    for axis, scale in ((ax.xaxis, ax.set_xscale), (ax.yaxis, ax.set_yscale)):
        scale("symlog", linthresh=threshold, linscale=0.5)
        axis.set_ticks([tick for tick in ticks if tick >= 0 or negative])


def _interpolate(x: Tensor, y: Tensor, at: float) -> float:
    """The height of a curve through sorted points."""
    order = x.argsort()
    x, y = x[order], y[order]
    right = int(torch.searchsorted(x, at).clamp(1, len(x) - 1)) if len(x) > 1 else 0
    if right == 0:
        return float(y[0])
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    return float(y[right - 1] + share * (y[right] - y[right - 1]))
