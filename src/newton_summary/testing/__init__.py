"""A conformance suite for those who add a rule, a solver or a direction.

Plain functions, for any test framework: each returns where everything is as it must be, and raises an
``AssertionError`` that names what is not.  This package's own rules, solvers and directions pass them in its tests.
"""

from newton_summary.testing.directions import check_direction
from newton_summary.testing.rules import check_rule
from newton_summary.testing.solvers import check_solver, cubic_decrease, quadratic_decrease

__all__ = ["check_direction", "check_rule", "check_solver", "cubic_decrease", "quadratic_decrease"]
