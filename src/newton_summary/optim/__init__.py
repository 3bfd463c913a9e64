"""Applying: optimizers that take their rates from measurements, and what they are made of."""

from newton_summary.optim.newton_summary import NewtonSummary

__all__ = ["NewtonSummary"]
