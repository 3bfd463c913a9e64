"""Where the rates begin: by the loss along the first step."""

from __future__ import annotations

import math
from collections.abc import Callable

_SHARE = 1 / 3  # of the best length of the first step
_FURTHEST = 3.0  # times the usual rate, or its third
_TRIES = 5  # doublings or halvings of the usual rate: further ones would not count


def first_scale(loss_after: Callable[[float], float]) -> float:
    """What the usual rate is multiplied by at first: half way, in the logarithm, to a third of the best first step.

    The first direction is one sign for each entry, and the best step along it is greedy: followed by ten as long, it
    throws layers far, and some never come back.  So it counts by half, and moves the usual rate by a factor of three
    at most; but no rate is above the best first step, after which the loss would rise from the beginning.

    Args:
        loss_after: the loss of a batch after a step of a multiple of the usual rate; the same batch each time.

    Example:
        >>> round(first_scale(lambda size: (size - 15.0) ** 2), 3)  # the root of a third of 16
        2.309
        >>> first_scale(lambda size: (size - 0.06) ** 2)  # where the loss would rise
        0.0625
    """
    best = best_length(loss_after)
    return min(max(math.sqrt(_SHARE * best), 1 / _FURTHEST), _FURTHEST, best)


def best_length(loss_after: Callable[[float], float]) -> float:
    """The power of two from which the loss rises either way, as seen from 1; that itself where the loss is none."""
    here, twice = loss_after(1.0), loss_after(2.0)
    length, reached, factor = (2.0, twice, 2.0) if twice < here else (1.0, here, 0.5)
    for _ in range(_TRIES):
        further = loss_after(factor * length)
        if not further < reached and math.isfinite(reached):
            break
        length, reached = factor * length, further
    return length if math.isfinite(reached) else 1.0
