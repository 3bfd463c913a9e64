"""Suggested learning rates as a picture: the loss against the rate, as of a learning-rate finder, and every group's."""

from __future__ import annotations

import math
from statistics import geometric_mean
from typing import TYPE_CHECKING

from newton_summary.plots.parts import SERIES, Axes, Figure, quiet

if TYPE_CHECKING:
    from newton_summary.watch.lr_finder import SuggestedRates

_BLUE, _ORANGE, _GREEN = SERIES[:3]
_CHOSEN = "chosen: the largest that cannot\nbe told from the best"
_DEAD = "a tensor stopped learning"
_ROW = 0.22  # inches that a group takes
_MOST_NAMED = 60


def suggestion(suggested: SuggestedRates) -> Figure:
    """What :func:`~newton_summary.suggest_rates` tried, and what it suggests for every group, over one axis of rates.

    Above, the loss that short trainings came to: a point stands at the geometric mean of the groups' rates in that
    training, hollow where some tensor stopped learning, the ring around the one that was chosen, the largest that
    cannot be told from the best, a cross at the upper edge where a training diverged.  The dashed line is what is
    suggested, for a training that is longer.  Below, the suggested rate of every group, filled, and the one it had,
    hollow.

    Example:
        >>> from newton_summary.watch.lr_finder import SuggestedRates
        >>> rates, before, trials = {"a": 2e-3, "b": 8e-3}, {"a": 1e-3, "b": 1e-3}, {1.0: 2.0, 2.0: 1.0, 4.0: 1.5}
        >>> found = SuggestedRates(rates, before, [], trials, chosen=2.0, steps=1000, trial_steps=10, by_optimizer=[])
        >>> [ax.get_ylabel() for ax in suggestion(found).axes]
        ['loss', '']
    """
    rows = _ROW * min(len(suggested.rates), _MOST_NAMED)
    figure = Figure(figsize=(7.0, 3.6 + rows), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.8, rows + 0.5])
    _draw_trials(above, suggested)
    _draw_groups(below, suggested)
    return figure


def _draw_trials(ax: Axes, suggested: SuggestedRates) -> None:
    mean = geometric_mean(suggested.rates.values())
    points = [(mean * factor, loss) for factor, loss in suggested.trials.items()]
    finite = [(rate, loss) for rate, loss in points if math.isfinite(loss)]
    ax.plot(*zip(*finite, strict=True), "o-", color=_BLUE, markersize=4, linewidth=1.5)
    dead = [(mean * factor, suggested.trials[factor]) for factor in suggested.dead]
    if dead:
        ax.plot(*zip(*dead, strict=True), "o", color=_BLUE, markerfacecolor="white", markersize=4, label=_DEAD)
    diverged = [rate for rate, loss in points if not math.isfinite(loss)]
    if diverged:
        edge = ax.get_xaxis_transform()
        ax.plot(diverged, [1.0] * len(diverged), "x", color=_ORANGE, transform=edge, clip_on=False, label="diverged")
    best = suggested.trials[suggested.chosen]
    ax.plot(mean * suggested.chosen, best, "o", color=_BLUE, markersize=11, fillstyle="none", label=_CHOSEN)
    ax.axvline(mean, color=_GREEN, linestyle="--", label=f"for {suggested.steps} steps: {mean:.2g} in the mean")
    losses = [loss for _, loss in finite]
    if min(losses) > 0 and max(losses) > 5 * min(losses):
        ax.set_yscale("log")
    ax.set_xscale("log")
    ax.set_ylabel("loss")
    ax.set_title(f"Loss of trainings of {suggested.trial_steps} steps", pad=10.0)  # above the crosses
    ax.legend(frameon=False, fontsize=8)
    quiet(ax)


def _draw_groups(ax: Axes, suggested: SuggestedRates) -> None:
    names = list(suggested.rates)
    rows = range(len(names))
    now, before = ([rates[name] for name in names] for rates in (suggested.rates, suggested.before))
    ax.hlines(rows, now, before, color="0.8", linewidth=1.0, zorder=1)
    ax.plot(before, rows, "o", color="0.55", markerfacecolor="white", markersize=5, label="before", zorder=2)
    ax.plot(now, rows, "o", color=_GREEN, markersize=5, label="suggested", zorder=3)
    stride = -(-len(names) // _MOST_NAMED)
    ax.set_yticks(rows[::stride], names[::stride], fontsize=8)
    ax.set_ylim(len(names) - 0.3, -0.7)
    ax.set_xlabel("learning rate")
    ax.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.0)
    quiet(ax)
