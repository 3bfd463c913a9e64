"""Where the rates begin: by the loss along the first step."""

from __future__ import annotations

import math
from collections.abc import Callable

_SHARE = 1 / 3  # of the best length of the first step
_FURTHEST = 3.0  # times the usual rate, or its third
_SHORTEST = 0.5  # of the lengths that are tried, in usual rates
_DOUBLINGS = 6  # of it: further ones would not count


def first_scale(loss_after: Callable[[float], float]) -> float:
    """What the usual rate is multiplied by at first: half way, in the logarithm, to a third of the best first step.

    The first direction is one sign for each entry, and the best step along it is greedy: followed by ten as long, it
    throws layers far, and some never come back.  So it counts by half, and moves the usual rate by a factor of three
    at most.

    Args:
        loss_after: the loss of a batch after a step of a multiple of the usual rate; the same batch each time.

    Example:
        >>> round(first_scale(lambda size: (size - 15.0) ** 2), 3)  # the root of a third of 16
        2.309
    """
    return min(max(math.sqrt(_SHARE * best_length(loss_after)), 1 / _FURTHEST), _FURTHEST)


def best_length(loss_after: Callable[[float], float]) -> float:
    """The power of two, from the shortest on, after which the loss is larger."""
    length, reached = _SHORTEST, loss_after(_SHORTEST)
    for _ in range(_DOUBLINGS):
        further = loss_after(2 * length)
        if not further < reached:
            break
        length, reached = 2 * length, further
    return length
