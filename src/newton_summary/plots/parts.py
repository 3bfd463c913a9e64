"""What several pictures share: matplotlib, colours, and how names of groups are read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize, SymLogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:  # pragma: no cover - a test runs it in a process of its own
    raise ImportError("plots need matplotlib: pip install 'newton-summary[plots]'") from error

__all__ = [
    "SERIES",
    "Axes",
    "Figure",
    "MaxNLocator",
    "colormaps",
    "draw_matrix",
    "is_bias",
    "layer",
    "new_axes",
    "quiet",
    "signed_decades",
]

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours for lines: the palette of Okabe and Ito, darkest first."""

_DECADES = 4.0
_MOST_LABELS = 40


def new_axes(width: float, height: float) -> Axes:
    """The axes of a new figure of one panel."""
    return Figure(figsize=(width, height), layout="constrained").subplots()


def draw_matrix(ax: Axes, values: torch.Tensor, names: Sequence[str], unit: str) -> None:
    """A square matrix as a heatmap, with names on both axes and a colour bar."""
    norm = _signed_scale(values)
    cmap = colormaps["RdBu_r"].with_extremes(bad="0.6")
    image = ax.imshow(values.numpy(), cmap=cmap, norm=norm, interpolation="nearest", aspect="equal")
    _label_groups(ax, names)
    figure = ax.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(image, ax=ax, shrink=0.85)
    if isinstance(norm, SymLogNorm):
        bar.set_ticks(signed_decades(norm.vmax or 1.0, norm.linthresh), minor=False)
        unit = f"{unit}, symmetric logarithmic scale"
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _signed_scale(values: torch.Tensor) -> Normalize:
    """A colour scale that is symmetric about 0."""
    sizes = values.abs()[values.isfinite() & (values != 0)]
    if not len(sizes):
        return Normalize(-1.0, 1.0)
    top = float(sizes.max())
    if float(sizes.quantile(0.25)) > top * 10**-1.5:
        return Normalize(-top, top)
    threshold = max(top * 10**-_DECADES, float(sizes.min()))
    return SymLogNorm(threshold, linscale=0.5, vmin=-top, vmax=top, base=10)


def signed_decades(largest: float, threshold: float) -> list[float]:
    """Ticks at 0 and at powers of ten of both signs, down to just above the linear part of a logarithmic scale."""
    top = math.floor(math.log10(largest))
    bottom = math.ceil(math.log10(3 * threshold))
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


def is_bias(name: str) -> bool:
    """Whether a group is one of biases, by its name."""
    return name.rpartition(".")[2] in ("bias", "biases")


def layer(name: str) -> str:
    """The name of a group's layer: ``conv1`` for ``conv1.weight``."""
    owner, _, last = name.rpartition(".")
    return owner if owner and last in ("weight", "weights", "bias", "biases") else name


def quiet(ax: Axes) -> None:
    """A light grid and no frame."""
    ax.grid(True, which="major", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
