"""Pictures of summaries and of training runs; they need the extra ``plots``.

Nothing global is touched: no ``pyplot``, no backend, no style.  A function that draws one panel takes its axes and
returns them; without axes it draws into a figure of its own, ``ax.figure``, which ``ax.figure.savefig(path)`` writes.
Colours can be told apart with every common kind of colour blindness.
"""

from newton_summary.plots.matrices import correlations, heatmap, interactions, inverse
from newton_summary.plots.monitoring import decreases, loss_along, strongest
from newton_summary.plots.suggestion import suggestion
from newton_summary.plots.training import curves, rates, stack

__all__ = [
    "correlations",
    "curves",
    "decreases",
    "heatmap",
    "interactions",
    "inverse",
    "loss_along",
    "rates",
    "stack",
    "strongest",
    "suggestion",
]
