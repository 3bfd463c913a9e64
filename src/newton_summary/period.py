"""How often to measure: as often as a fixed share of the training time allows, by a count of operations.

Nothing is timed, so that runs repeat: the prices of a measurement and of a step follow from how many calls torch
dispatches for them, and how many floating-point operations these take.
"""

from __future__ import annotations

import math
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

FIRST_PERIOD = 20
"""The number of steps before the second measurement, which is the one that is counted: the first one traces."""

_SHARE = 0.22  # of the time of the steps, for measurements
_SHORTEST, _LONGEST = 10, 50  # steps
_CALL = 450_000  # floating-point operations that take as long as a call
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


def affordable_period(measurement: Price, evaluation: Price, share: float) -> int:
    """The number of steps between measurements with which these take about a quarter of the time of the steps.

    Small networks spend their time on calls, large ones on operations.  What they weigh against each other is that of a
    processor's core, where a call of Python and torch takes about 15 µs.

    Args:
        measurement: what a measurement takes, with what is solved and checked afterwards.
        evaluation: what one evaluation of the loss on the same batch takes.
        share: the size of that batch, against one of the training.

    Returns:
        A number from 10 to 50.
    """
    step = evaluation.calls * _CALL + _GRADIENT * evaluation.operations / share
    period = math.ceil((measurement.calls * _CALL + measurement.operations) / (_SHARE * step))
    return min(max(period, _SHORTEST), _LONGEST)
