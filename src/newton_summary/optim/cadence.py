"""When to compare the weights with their average."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

_SOONEST = 4  # steps from the first comparison to the second


@dataclass
class ComparisonCadence:
    """When to compare, in steps: before the first step, soon after, and ever more rarely, up to an interval.

    Args:
        every: the interval.
        last: the step before which the last comparison was.
        due: the step before which the next one is.

    Example:
        >>> cadence, steps = ComparisonCadence(every=10), []
        >>> for _ in range(8):
        ...     steps.append(cadence.due)
        ...     _ = cadence.take(cadence.due)
        >>> steps
        [0, 4, 8, 12, 18, 27, 37, 47]
    """

    every: int
    last: int = 0
    due: int = 0

    def take(self, step: int) -> int:
        """Takes a comparison before this step as made, and gives the number of steps since the last one."""
        gap = step - self.last
        self.last, self.due = step, step + min(max(_SOONEST, step // 2), self.every)
        return gap

    def hasten(self, step: int) -> None:
        """Brings the next comparison forward to this step, but no nearer to the last one than the first are."""
        self.due = min(self.due, max(step, self.last + _SOONEST))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        vars(self).update(state)
