"""newton-summary: how the parts of a network interact in its loss, and one learning rate for each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from newton_summary import measure, solve
from newton_summary.measure import summarize
from newton_summary.optim import NewtonSummary
from newton_summary.partition import Partition
from newton_summary.summary import Summary
from newton_summary.watch import Monitor, suggest_rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    __version__: str
else:

    def __getattr__(name: str) -> str:
        """``__version__``, looked up when it is asked for: that takes longer than it is worth at every import."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version

        return version("newton-summary")


__all__ = ["Monitor", "NewtonSummary", "Partition", "Summary", "measure", "solve", "suggest_rates", "summarize"]


def _plot(summary: Summary, ax: Axes | None = None) -> Axes:
    """H̄ as a heatmap, signed; needs the extra ``plots``.  Returns the axes."""
    from newton_summary.plots import heatmap

    return heatmap(summary, ax)


Summary.plot = _plot  # from here, because pictures are above what they show
