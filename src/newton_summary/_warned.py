"""Warnings at the line of the user's that they are about."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_INNER = (
    *("newton_summary", "torch", "contextlib"),
    *("lightning", "pytorch_lightning", "lightning_utilities", "transformers", "accelerate"),  # around the user's loop
)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns as of the last line of a call that is neither in this package, nor in torch or a trainer around it.

    A step is called through torch's wrappers, of which a scheduler and a compiled model add some: how many lines lie
    between is not known.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn("a pity")
        >>> print(caught[0].message)
        a pity
    """
    level, frame = 1, sys._getframe()
    above: FrameType | None = frame
    while above is not None and above.f_globals.get("__name__", "").partition(".")[0] in _INNER:
        level, above = level + 1, above.f_back
    warnings.warn(message, category, stacklevel=level)
