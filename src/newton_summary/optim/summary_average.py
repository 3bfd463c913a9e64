"""Moving averages of summaries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from newton_summary._checks import check_fraction
from newton_summary.summary import Summary


class SummaryAverage:
    """An average of ḡ, H̄ and |D^(3)[s, s, s]| over the recent measurements of a run, each divided by its loss.

    - *Divided by the loss*, because a loss falls by decades, and its derivatives with it: an average of them as they
      are would go on speaking of the first measurements.  Rates do not depend on the scale of a summary.  The divisor
      at most halves from one measurement to the next, so that a loss that passes through 0 does no harm.
    - *Recent* means the last third of the measurements, until those are as many as ``momentum`` remembers: the n-th
      comes in with weight 3 / (n + 2), from then on with 1 − momentum.  What was measured at the initial weights, where
      everything is large, is soon forgotten.
    - The third order is averaged by its absolute value, which is what the cubic term is made of: signs that change
      from one measurement to the next must not cancel.

    Args:
        momentum: the share of the past in the long run, in [0, 1).

    Attributes:
        value: the average, or ``None`` before the first update.

    Source:
        docs/method.md, section 2; docs/research.md has what it is worth.
    """

    def __init__(self, momentum: float) -> None:
        check_fraction("averaging", momentum)
        self.momentum = momentum
        self.count = 0
        self.scale = 0.0
        self.value: Summary | None = None

    def update(self, summary: Summary) -> Summary:
        """Takes a new measurement in, and returns the average."""
        self.count += 1
        self.scale = max(abs(float(summary.loss)), self.scale / 2) or 1.0
        third = None if summary.third_diagonal is None else summary.third_diagonal.abs()
        new = replace(summary, third=third) * (1 / self.scale)
        share = max(3 / (self.count + 2), 1 - self.momentum)
        self.value = new if self.value is None else self.value * (1 - share) + new * share
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, which torch does not cast to a parameter's type."""
        value = None if self.value is None else self.value.to_dict()
        return {"count": self.count, "scale": self.scale, "value": value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.count, self.scale = state["count"], state["scale"]
        self.value = None if state["value"] is None else Summary.from_dict(state["value"])
