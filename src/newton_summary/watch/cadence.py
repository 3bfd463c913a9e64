"""How often a monitor measures, and on how many samples: as it is told, or as a share of the training's time allows."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from statistics import mean, median
from typing import Any, Protocol, TypeAlias

import torch

from newton_summary.measure.price import CALL, Price

Agreement: TypeAlias = Callable[[Sequence[float]], list[float]]
"""Makes of every process's numbers those that all go by: their means."""

SHORTEST = 100
"""Steps between measurements that are paid for by time, at least."""

FEW = 8
"""Samples that are measured at least, of batches that have them."""


_KEPT = ("samples", "_adapts", "_is_due", "_measured", "_look", "_cost", "_size", "_saved", "_prices", "_has_recorded")
"""What of a cadence outlives its process: all but the share, the clock, and what it read."""


class Cadence(Protocol):
    """When a monitor measures, and on how much."""

    def is_due(self, taken: int) -> bool:
        """Whether it is time to measure, before the next step, after so many."""
        ...

    def spending(self) -> contextlib.AbstractContextManager[None]:
        """A block whose time is spent on measuring."""
        ...

    def has_measured(self, taken: int, samples: float) -> None:
        """A measurement was made, on so many samples of each batch in the mean; 0 where it failed."""
        ...

    def samples_of(self, size: int, evaluation: Callable[[], Price]) -> int:
        """How many samples the next measurement takes of a batch of this size.

        Args:
            size: of the batch.
            evaluation: counts an evaluation of the loss on it.
        """
        ...

    def takes_whole(self) -> bool:
        """Whether it takes batches whole from now on, because samples cannot stand for them."""
        ...

    def end_of_step(self, taken: int, agree: Agreement) -> None:
        """A step was taken."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training goes on from: plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        ...

    def __str__(self) -> str:
        """How often, in words."""
        ...


class Fixed:
    """Every so many steps, and on as many samples as one says: nothing depends on time.

    Args:
        every: the number of steps.
        samples: of each batch; ``None``: all.
    """

    def __init__(self, every: int, samples: int | None = None) -> None:
        self.every, self.samples = every, samples

    def is_due(self, taken: int) -> bool:
        """See :class:`Cadence`."""
        return taken % self.every == 0

    def spending(self) -> contextlib.AbstractContextManager[None]:
        """See :class:`Cadence`."""
        return contextlib.nullcontext()

    def has_measured(self, taken: int, samples: float) -> None:
        """See :class:`Cadence`."""

    def samples_of(self, size: int, evaluation: Callable[[], Price]) -> int:
        """See :class:`Cadence`."""
        return size if self.samples is None else min(self.samples, size)

    def takes_whole(self) -> bool:
        """It does not: samples that were asked for are not replaced."""
        return False

    def end_of_step(self, taken: int, agree: Agreement) -> None:
        """See :class:`Cadence`."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it is as it was told."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`Cadence`."""

    def __str__(self) -> str:
        return f"every {self.every} steps" + (f", on {self.samples} samples of a batch" if self.samples else "")


class Affordable:
    """As often, and on as many samples, as a share of the training's time pays for.

    The time of steps, times the share, is saved up.  The next measurement waits until that has paid for those before,
    recording the graph included, and is as much besides as the last one took.  So all together cost the share at most,
    but for the first one, which comes at once, and for what a last one took beyond what was expected.  A step takes the
    median of those without a measurement: an evaluation in between, or a night, pays nothing.

    The number of samples follows from what measurements took: a + b n for n samples.  It is the largest for which a
    measurement is paid for by a hundred steps; but not below a / b, where half the price is not for samples, so that
    fewer would hardly be cheaper; nor below eight; and it is all where it would be more than half.  What a measurement
    then takes too long it makes up for by being rarer.  Before anything was measured a / b is guessed by counting
    (:mod:`newton_summary.measure.price`) the operations of the loss, which grow with the samples, and its calls, which
    do not.

    Otherwise nothing is counted in place of being timed, as it is for the optimizer: what is promised is a share of
    time, on any device and beside any loader, and a monitor changes nothing of the training that could fail to repeat.

    Args:
        share: of the time.
        samples: of each batch; ``None``: as many as that pays for, half at most or all.
        device: what the training runs on.  An accelerator's queue is emptied before the clock is read.
        clock: gives seconds.  Default: processor time, which other programs do not stretch; with an accelerator, time.

    Example:
        >>> seconds = iter([0.0, 4.0, *(4.0 + i / 8 for i in range(1, 1100))])  # 4 s for measuring, steps of 1/8 s
        >>> cadence = Affordable(1 / 16, clock=lambda: next(seconds))
        >>> with cadence.spending():
        ...     cadence.has_measured(0, 8.0)
        >>> step = 0
        >>> while not cadence.is_due(step):
        ...     step += 1
        ...     cadence.end_of_step(step, list)
        >>> step
        1024
    """

    def __init__(
        self,
        share: float,
        samples: int | None = None,
        device: torch.device | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.share = share
        self.samples: int | None = samples
        self._adapts = samples is None
        self._accelerator = None if device is None or device.type == "cpu" else device
        self._clock = clock or (time.process_time if self._accelerator is None else time.perf_counter)
        self._is_due = True  # at once, so that there is something to see
        self._measured, self._look = 0, 0  # before which step it was measured, and after which it is asked again
        self._cost, self._size = 0.0, 0.0  # of the last measurement
        self._saved = 0.0  # when it was made
        self._prices: dict[int, float] = {}  # by numbers of samples, the last known one last
        self._has_recorded = False
        self._durations: deque[float] = deque(maxlen=SHORTEST)
        self._last = math.nan  # when the last step ended
        self._is_spent = False  # whether there was a measurement within this step

    def is_due(self, taken: int) -> bool:
        """See :class:`Cadence`."""
        return self._is_due

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """See :class:`Cadence`."""
        if self._accelerator is not None:
            torch.get_device_module(self._accelerator).synchronize(self._accelerator)
        start = self._clock()
        try:
            yield
        finally:
            self._cost += self._clock() - start
            self._is_spent = True

    def has_measured(self, taken: int, samples: float) -> None:
        """See :class:`Cadence`."""
        self._is_due = False
        self._measured, self._look, self._size = taken, taken + SHORTEST, samples

    def samples_of(self, size: int, evaluation: Callable[[], Price]) -> int:
        """See :class:`Cadence`."""
        if not self._adapts:
            return size if self.samples is None else min(self.samples, size)
        if size < 2 * FEW:
            return size
        if self.samples is None:
            price = evaluation()
            self.samples = _doubled(size * price.calls * CALL / max(price.operations, 1))
        return self.samples if 2 * self.samples <= size else size

    def takes_whole(self) -> bool:
        """See :class:`Cadence`; not where a number of samples was asked for."""
        if not self._adapts:
            return False
        self._adapts, self.samples = False, None  # all
        return True

    def end_of_step(self, taken: int, agree: Agreement) -> None:
        """See :class:`Cadence`."""
        now = self._clock()
        if not (self._is_spent or math.isnan(self._last)):
            self._durations.append(now - self._last)
        self._last, self._is_spent = now, False
        if self._is_due or taken < self._look or not self._durations:
            return
        step = median(self._durations) or mean(self._durations)  # where steps are shorter than the clock's ticks
        cost, step, size, adapts = agree([self._cost, step, self._size, float(self._adapts)])
        if adapts < 1:  # in another process batches are taken whole
            self.takes_whole()
        income = self.share * step
        saved = self._saved - cost + income * (taken - self._measured)
        if saved < cost:
            self._look = taken + (math.ceil((cost - saved) / income) if income else SHORTEST)
            return
        self._is_due, self._cost, self._saved = True, 0.0, cost
        if self._adapts and size > 0:  # what failed has no price
            self.samples = self._affordable(round(size), cost, income * SHORTEST)

    def _affordable(self, size: int, cost: float, budget: float) -> int:
        """The number of samples of the next measurement.

        Args:
            size: that of the last one.
            cost: what it took.
            budget: what one may take.
        """
        if not self._has_recorded:  # the graph, at a price of its own: once more
            self._has_recorded = True
            return size
        self._prices.pop(size, None)
        self._prices[size] = cost
        if len(self._prices) == 1:
            return size // 2 if cost > budget and size > FEW else 2 * size
        largest = 2 * max(self._prices)
        (m, price), (n, other) = list(self._prices.items())[-2:]
        slope = (other - price) / (n - m)
        if slope <= 0:
            return largest
        fixed = max(price - slope * m, 0.0)
        return _doubled(min(max(fixed, budget - fixed) / slope, float(largest)))

    def state_dict(self) -> dict[str, Any]:
        """What measurements have cost, and what is saved up; the time of a step is measured anew."""
        return {key: list(v.items()) if key == "_prices" else v for key, v in vars(self).items() if key in _KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; a number of samples that was asked for stays, and all of another kind."""
        told = () if self._adapts else ("samples", "_adapts")
        known = {key: dict(v) if key == "_prices" else v for key, v in state.items() if key not in told}
        vars(self).update(known)
        self._durations.clear()
        self._last = math.nan

    def __str__(self) -> str:
        return f"in {self.share:.0%} of the time"


def _doubled(samples: float) -> int:
    """The largest number of this size at most that doubling the fewest gives; the fewest at least."""
    return FEW << math.floor(math.log2(max(samples / FEW, 1.0)))
