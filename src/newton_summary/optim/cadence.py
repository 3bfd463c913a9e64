"""How often to look and to measure: as often as a fixed share of the training time allows, by a count of operations.

Nothing is timed, so that runs repeat: the prices of a measurement, a look and a step follow from how many calls torch
dispatches for them, and how many floating-point operations these take.  At the beginning of a training, where rates
change most, and after an alarm, looks are more frequent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Periods:
    """How often something is done, in steps.

    Args:
        first: the period until its price was counted.
        shortest: of those that may follow.
        longest: of those that may follow.
        share: of the time of the steps, for doing it.
    """

    first: int
    shortest: int
    longest: int
    share: float


LOOKS = Periods(first=5, shortest=5, longest=20, share=0.14)
MEASUREMENTS = Periods(first=20, shortest=20, longest=200, share=0.06)

BEGINNING = 100  # steps, of a training
_OFTEN = 4  # times as many looks there
COMPARED = 3  # looks from one comparison of the weights with their average to the next
_DEAF = 8  # steps after an alarm, a retreat or the first look, in which alarms are not heard: looks are frequent then

_CALL = 450_000  # floating-point operations that take as long as a call
_AROUND = 40  # calls that take as long as the Python code around a look or a measurement
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


def affordable_period(price: Price, evaluation: Price, periods: Periods) -> int:
    """The number of steps between looks, or between measurements, that a share of the time of the steps allows.

    Small networks spend their time on calls, large ones on operations.  What they weigh against each other is that of a
    processor's core, where a call of Python and torch takes about 15 µs.

    Args:
        price: what one takes, with all that belongs to it.
        evaluation: what one evaluation of the loss takes.
        periods: the share, and the limits of the result.
    """
    step = evaluation.calls * _CALL + _GRADIENT * evaluation.operations
    period = math.ceil(((price.calls + _AROUND) * _CALL + price.operations) / (periods.share * step))
    return min(max(period, periods.shortest), periods.longest)


def period_at(step: int, settled: int) -> int:
    """The period of looks at a step, of which this is the one that they settle for: a quarter of it at first."""
    return math.ceil(settled / _OFTEN) if step < BEGINNING else settled


def is_time_to_look(since: int, period: int) -> bool:
    """Whether to look, so many steps after the first look, the last alarm or retreat.

    It is time after 0, 1, 2, 4, 8 … steps, and then with each period: a rate can be wrong by any factor, and a whole
    period of its steps would go where no loss was ever seen.
    """
    return since % period == 0 or (since < period and since & (since - 1) == 0)


@dataclass
class LookTimes:
    """When to look, in steps.

    Args:
        every: the period, once looks have grown apart; ``None`` until their price was counted.
        settles: whether it is a quarter of that at first.
        began: the step from which on they grow apart: that of the first look, the last alarm or retreat.
    """

    every: int | None
    settles: bool
    began: int | None = None

    def period(self, step: int) -> int:
        """The number of steps between looks at this step, once they have grown apart."""
        if self.every is None:
            return LOOKS.first
        return period_at(step, self.every) if self.settles else self.every

    def is_due(self, step: int, alarmed: bool) -> bool:
        """Whether to look before this step, and whether a gradient is reason to."""
        if self.began is None or (alarmed and step - self.began >= min(self.period(step), _DEAF)):
            self.began = step
        return is_time_to_look(step - self.began, self.period(step))

    def gap(self, step: int) -> int:
        """The number of steps from a look before this one to the next, at most."""
        assert self.began is not None
        return min(max(step - self.began, 1), self.period(step))
