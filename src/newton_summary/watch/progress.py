"""Whether the loss has fallen since the first measurement, beyond what batches differ by."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

from newton_summary.watch.words import were_too_large

_LATEST = 5  # measurements whose median is the loss of now: what one batch has, or one spike, is none of it
_FEWEST = 2  # after the first, before which nothing is said
_SURE = 2.0  # standard deviations
_NORMAL = 0.6745 * math.sqrt(6)  # the median of |a − 2 b + c| for normal numbers of deviation 1


class Progress:
    """The losses of the first measurement and of the last ones, and what was said of all rates at first.

    Args:
        window: how many of the last are remembered; measurements as early as that count as the first ones, too.

    Example:
        >>> progress = Progress(20)
        >>> for step, loss in enumerate((2.4, 2.5, 2.4, 2.6)):
        ...     progress.add(loss, step)
        >>> progress.words()
        'the loss is no lower than at the first measurement (2.4, now 2.5)'
    """

    def __init__(self, window: int) -> None:
        self._window, self._count, self._start, self._too_large = window, 0, 0, ""
        self._first: float | None = None
        self._later: deque[float] = deque(maxlen=max(window, _LATEST))

    def add(self, loss: float, step: int) -> None:
        """Takes in the loss of a measurement, a mean over its batches, after so many steps of the training."""
        self._count += 1
        if self._first is None:
            self._first, self._start = loss, step
        elif step > self._start:
            self._later.append(loss)

    def hear(self, overall: str, step: int) -> None:
        """Takes in what was then said of all rates, after so many steps."""
        if not self._too_large and self._count <= self._window:
            self._too_large = were_too_large(overall, step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "_later": list(self._later)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; how much is remembered stays as it is here."""
        own = {"_window": self._window, "_later": deque(state["_later"], self._later.maxlen)}
        vars(self).update({**state, **own})

    def words(self) -> str:
        """That the loss is no lower than at first, in a sentence; empty where it is, or where that is too early to say.

        It is lower where the median of the last five measurements is, by two standard errors of its difference to the
        first one.  The deviation is that of second differences, of which a steady fall is no part.
        """
        if self._first is None or len(self._later) < _FEWEST:
            return ""
        later = list(self._later)
        now = median(later[-_LATEST:])
        if self._first - now > _SURE * _error(later):
            return ""
        lower = "no" if now >= self._first else "not surely"
        said = f"the loss is {lower} lower than at the first measurement ({self._first:.3g}, now {now:.3g})"
        return f"{said}; {self._too_large}" if self._too_large else said


def _error(losses: Sequence[float]) -> float:
    """The standard error of the difference between one loss and the median of the last five; 0 from few losses."""
    if len(losses) < _LATEST:
        return 0.0
    bends = [abs(a - 2 * b + c) for a, b, c in zip(losses, losses[1:], losses[2:], strict=False)]
    return median(bends) / _NORMAL * math.sqrt(1 + math.pi / 2 / _LATEST)  # medians are worse than means by π / 2
