"""How often to search and to measure: as often as a fixed share of the training time allows, by a count of operations.

Nothing is timed, so that runs repeat: the prices of a measurement, a line search and a step follow from how many calls
torch dispatches for them, and how many floating-point operations these take.  At the beginning of a training, where
rates change most, and after an alarm, line searches are more frequent.
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


SEARCHES = Intervals(first=5, shortest=5, longest=20, share=0.14)
MEASUREMENTS = Intervals(first=20, shortest=20, longest=200, share=0.06)

BEGINNING = 100  # steps, of a training
_OFTEN = 4  # times as many line searches there
COMPARED = 3  # line searches from one comparison of the weights with their average to the next
_DEAF = 8  # steps after an alarm, a rollback or the first search, in which alarms are not heard: searches are frequent

_CALL = 450_000  # floating-point operations that take as long as a call
_AROUND = 40  # calls that take as long as the Python code around a line search or a measurement
_GRADIENT = 3  # its operations, in those of the loss; its calls, compiled ones, are as dear as the loss's own


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
    """The number of steps between line searches, or measurements, that a share of the time of the steps allows.

    Small networks spend their time on calls, large ones on operations.  What they weigh against each other is that of a
    processor's core, where a call of Python and torch takes about 15 µs.

    Args:
        price: what one takes, with all that belongs to it.
        evaluation: what one evaluation of the loss takes.
        intervals: the share, and the limits of the result.
    """
    step = evaluation.calls * _CALL + _GRADIENT * evaluation.operations
    interval = math.ceil(((price.calls + _AROUND) * _CALL + price.operations) / (intervals.share * step))
    return min(max(interval, intervals.shortest), intervals.longest)


def interval_at(step: int, settled: int) -> int:
    """The interval of searches at a step, of which this is the one that they settle for: a quarter of it at first."""
    return math.ceil(settled / _OFTEN) if step < BEGINNING else settled


def is_time_to_search(since: int, interval: int) -> bool:
    """Whether to search, so many steps after the first line search, the last alarm or rollback.

    It is time after 0, 1, 2, 4, 8 … steps, and then with each interval: a rate can be wrong by any factor, and a whole
    interval of its steps would go where no loss was ever seen.
    """
    return since % interval == 0 or (since < interval and since & (since - 1) == 0)


@dataclass
class SearchCadence:
    """When to search along the line, in steps.

    Args:
        every: the interval, once searches have grown apart; ``None`` until their price was counted.
        settles: whether it is a quarter of that at first.
        began: the step from which on they grow apart: that of the first search, the last alarm or rollback.

    Example:
        >>> cadence = SearchCadence(every=8, settles=False)
        >>> cadence.begin(100)
        >>> [step for step in range(100, 130) if cadence.is_due(step)]
        [100, 101, 102, 104, 108, 116, 124]
    """

    every: int | None
    settles: bool
    began: int | None = None

    def begin(self, step: int) -> None:
        """From this step on, searches grow apart anew."""
        self.began = step

    def note(self, step: int, alarmed: bool) -> None:
        """Begins at the first step, and where a gradient is reason to, unless it has just begun."""
        if self.began is None or (alarmed and step - self.began >= min(self.interval(step), _DEAF)):
            self.begin(step)

    def interval(self, step: int) -> int:
        """The number of steps between searches at this step, once they have grown apart."""
        if self.every is None:
            return SEARCHES.first
        return interval_at(step, self.every) if self.settles else self.every

    def is_due(self, step: int) -> bool:
        """Whether to search before this step."""
        return self.began is not None and is_time_to_search(step - self.began, self.interval(step))

    def gap(self, step: int) -> int:
        """The number of steps from a search before this one to the next, at most."""
        assert self.began is not None
        return min(max(step - self.began, 1), self.interval(step))

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        vars(self).update(state)
