"""Solving: pure functions of a summary that say which step sizes to take, and why.

Every solver has one form, ``solver(summary, ..., nonnegative=False, bounds=None) -> Step``, knows no model, and works
in float64 on the host after one transfer.  ``shrink`` changes a summary before it is solved, ``line_search`` a step
after, and ``decrease`` says what the cubic model makes of any step sizes.
"""

from newton_summary.solve.cubic import cubic
from newton_summary.solve.line_search import line_search
from newton_summary.solve.model import decrease
from newton_summary.solve.newton import newton
from newton_summary.solve.ridge import ridge
from newton_summary.solve.shrinkage import shrink, target_rates
from newton_summary.solve.step import Status, Step

__all__ = ["Status", "Step", "cubic", "decrease", "line_search", "newton", "ridge", "shrink", "target_rates"]
