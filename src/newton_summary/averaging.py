"""Moving averages of summaries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from newton_summary._checks import check_fraction
from newton_summary.summary import Summary


class SummaryAverage:
    """A bias-corrected exponential average of ḡ, H̄ and |D^(3)[s, s, s]|.

    The third order is averaged by its absolute value, which is what the cubic term is made of: signs that change from
    one measurement to the next must not cancel.

    Args:
        momentum: the share of the past, in [0, 1).

    Attributes:
        value: the average, or ``None`` before the first update.
    """

    def __init__(self, momentum: float) -> None:
        check_fraction("averaging", momentum)
        self.momentum = momentum
        self.count = 0
        self.value: Summary | None = None

    def update(self, summary: Summary) -> Summary:
        """Takes a new measurement in, and returns the average."""
        new = replace(summary, third=None if summary.third_diagonal is None else summary.third_diagonal.abs())
        self.count += 1
        share = (1 - self.momentum) / (
            1 - self.momentum**self.count
        )  # the weight of the newest in the corrected average
        self.value = new if self.value is None else self.value * (1 - share) + new * share
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, which torch does not cast to a parameter's type."""
        return {"count": self.count, "value": None if self.value is None else self.value.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.count = state["count"]
        self.value = None if state["value"] is None else Summary.from_dict(state["value"])
