"""How often to compare and to measure: as a fixed share of the training time allows, by a count of operations.

Nothing is timed, so that runs repeat: the prices of a measurement, a comparison and a step follow from how many calls
torch dispatches for them, and how many floating-point operations these take.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Intervals:
    """How often something is done, in steps.

    Args:
        first: the interval until its price was counted.
        shortest: of those that may follow.
        longest: of those that may follow.
        share: of the time of the steps, for doing it.
    """

    first: int
    shortest: int
    longest: int
    share: float


COMPARISONS = Intervals(first=10, shortest=10, longest=20, share=0.14)
MEASUREMENTS = Intervals(first=20, shortest=20, longest=200, share=0.06)

CALL = 450_000  # floating-point operations that take as long as a call
GRADIENT = 3  # its operations, in those of the loss; its calls, compiled ones, are as dear as the loss's own
_AROUND = 40  # calls that take as long as the Python code around a comparison or a measurement
_SOONEST = 4  # steps from the first comparison to the second


class Price(TorchDispatchMode):
    """Counts what is dispatched in a block: calls, and the floating-point operations of products and convolutions."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls, self.operations = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(getattr(func, "_overloadpacket", None))
        self.calls += 1
        self.operations += 0 if count is None else int(count(*args, **kwargs, out_val=out))
        return out


def affordable_interval(price: Price, evaluation: Price, intervals: Intervals) -> int:
    """The number of steps between comparisons, or measurements, that a share of the time of the steps allows.

    Small networks spend their time on calls, large ones on operations.  What they weigh against each other is that of a
    processor's core, where a call of Python and torch takes about 15 µs.

    Args:
        price: what one takes, with all that belongs to it.
        evaluation: what one evaluation of the loss takes.
        intervals: the share, and the limits of the result.
    """
    step = evaluation.calls * CALL + GRADIENT * evaluation.operations
    interval = math.ceil(((price.calls + _AROUND) * CALL + price.operations) / (intervals.share * step))
    return min(max(interval, intervals.shortest), intervals.longest)


@dataclass
class ComparisonCadence:
    """When to compare, in steps: before the first step, soon after, and ever more rarely, up to an interval.

    Args:
        every: the interval; ``None`` until the price was counted.
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

    every: int | None
    last: int = 0
    due: int = 0

    def take(self, step: int) -> int:
        """Takes a comparison before this step as made, and gives the number of steps since the last one."""
        gap, interval = step - self.last, self.every or COMPARISONS.first
        self.last, self.due = step, step + min(max(_SOONEST, step // 2), interval)
        return gap

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        vars(self).update(state)
