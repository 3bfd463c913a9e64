"""Looking on: a monitor beside any optimizer, what it advises, and a learning-rate finder that knows layers."""

from newton_summary.watch.lr_finder import suggest_rates
from newton_summary.watch.monitor import Monitor

__all__ = ["Monitor", "suggest_rates"]
