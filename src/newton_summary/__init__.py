"""newton-summary: how the parts of a network interact in its loss, and one learning rate for each of them."""

from newton_summary import measure, solve
from newton_summary.measure import summarize
from newton_summary.optim import NewtonSummary
from newton_summary.partition import Partition
from newton_summary.summary import Summary
from newton_summary.watch import Monitor, suggest_rates

__all__ = ["Monitor", "NewtonSummary", "Partition", "Summary", "measure", "solve", "suggest_rates", "summarize"]
