"""Applying: optimizers that take their rates from measurements, and what they are made of."""

from newton_summary.optim.measured import MeasuredOptimizer
from newton_summary.optim.newton_summary import NewtonSummary
from newton_summary.optim.paper import PaperNewtonSummary

__all__ = ["MeasuredOptimizer", "NewtonSummary", "PaperNewtonSummary"]
