"""Solving: pure functions of a summary that say which step sizes to take, and why."""

from newton_summary.solve.step import Status, Step

__all__ = ["Status", "Step"]
