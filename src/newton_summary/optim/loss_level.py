"""Whether the loss of a training has risen, beyond what batches differ by."""

from __future__ import annotations

import math
from typing import Any

_FEWEST = 5  # losses that a level is made of
_SURE = 3.0  # standard errors
_WINDOW = 4.0  # the part of the run, as 1/4 of its steps, that a level is over
_MOST = 0.5  # of a level, that one loss is


class LossLevel:
    """The level of the loss over the last part of the run, and the lowest that it had.

    It has risen where it is higher than the lowest one though either was off by three standard errors: of runs that
    stand still for two thousand steps one in twenty is taken for that, or one in seven where noise is skewed.  What
    follows is another level, and what was known of the old one is forgotten: a loss that rises for reasons of its own
    shortens no step again and again.

    Example:
        >>> level = LossLevel()
        >>> any(level.has_risen(loss, steps=400, gap=20) for loss in (1.0, 1.1, 0.9, 1.0, 1.1, 1.0, 0.9))
        False
        >>> [level.has_risen(loss, steps=400, gap=20) for loss in (2.0, 2.5, 1.8, 2.2, 2.6, 2.1)].count(True)
        1
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._count = 0
        self._mean = self._spread = self._weight = 0.0  # the last is the sum of the squares of all weights in the mean
        self._lowest = math.inf

    def has_risen(self, loss: float, steps: int, gap: int) -> bool:
        """Takes a loss in.

        Args:
            loss: of a fresh batch.
            steps: the number of steps taken.
            gap: those of them since the last loss.
        """
        self._count += 1
        share = max(min(_WINDOW * gap / (steps + _WINDOW), _MOST), 1 / self._count)
        rise = loss - self._mean
        self._mean += share * rise
        self._spread = (1 - share) * (self._spread + share * rise**2)
        self._weight = (1 - share) ** 2 * self._weight + share**2
        if self._count < _FEWEST:
            return False
        error = _SURE * math.sqrt(self._spread * self._weight / (1 - self._weight))
        if self._mean - error > self._lowest:
            self._forget()
            return True
        self._lowest = min(self._lowest, self._mean + error)
        return False

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        vars(self).update(state)
