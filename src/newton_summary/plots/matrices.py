"""Heatmaps of interactions."""

from __future__ import annotations

import torch

from newton_summary.plots.parts import Axes, Figure, draw_matrix, is_bias, layer, new_axes
from newton_summary.summary import Summary
from newton_summary.watch.advice import correlations as correlations_of


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
    ax = ax or new_axes(6.0, 5.2)
    draw_matrix(ax, hessian, summary.names, "units of the loss")
    ax.set_title(title)
    return ax


def correlations(summary: Summary, ax: Axes | None = None, title: str = "H̄ as correlations") -> Axes:
    """H̄_ij / √|H̄_ii H̄_jj| as a heatmap: interactions free of the lengths of the groups' directions.

    1 on the diagonal, −1 where a group's own curvature is negative, 0 where it is 0.

    Args:
        summary: S groups, with H̄.
        ax: where to draw.  Default: a new figure.
        title: of the panel.

    Raises:
        ValueError: the summary has no H̄.
    """
    ax = ax or new_axes(6.0, 5.2)
    draw_matrix(
        ax, correlations_of(summary.cpu()), summary.names, "1: the same work,  0: nothing in common,  below 0: help"
    )
    ax.set_title(title)
    return ax


def inverse(summary: Summary, ax: Axes | None = None, title: str = "H̄⁻¹") -> Axes:
    """H̄⁻¹ as a heatmap, on the scales of :func:`heatmap`; where there is none, the panel says so.

    Args:
        summary: S groups, with H̄.
        ax: where to draw.  Default: a new figure.
        title: of the panel.

    Raises:
        ValueError: the summary has no H̄.
    """
    ax = ax or new_axes(6.0, 5.2)
    matrix = _inverse(summary.tensor(2).detach().cpu())
    if matrix is None:
        return _say_singular(ax)
    draw_matrix(ax, matrix, summary.names, "1 / units of the loss")
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
    biases = [is_bias(name) for name in summary.names]
    order = sorted(range(len(summary)), key=lambda i: biases[i])
    first_bias = biases.count(False)
    split = 0 < first_bias < len(order)
    names = [layer(summary.names[i]) if split else summary.names[i] for i in order]
    figure = Figure(figsize=(11.0, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    panels = (
        (left, "H̄", hessian, "units of the loss"),
        (right, "H̄⁻¹", _inverse(hessian), "1 / units of the loss"),
    )
    for ax, name, matrix, unit in panels:
        if matrix is None:
            _say_singular(ax)
            continue
        draw_matrix(ax, matrix[order][:, order], names, unit)
        ax.set_title(name, pad=18 if split else 6)
        if split:
            _separate_blocks(ax, first_bias, len(order))
    if title:
        figure.suptitle(title)
    return figure


def _say_singular(ax: Axes) -> Axes:
    ax.set_axis_off()
    ax.text(0.5, 0.5, "H̄ has no inverse:\nit is singular or not finite", ha="center", va="center")
    return ax


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
