"""Which gradients a direction was computed from, to know whether they are still there."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor


class HeldGradients:
    """The gradients of some parameters as they are now, by identity: nothing is copied, and none is kept alive.

    Example:
        >>> import torch
        >>> p = torch.ones(2, requires_grad=True)
        >>> p.grad = torch.ones(2)
        >>> held = HeldGradients([p])
        >>> held.are_those_of([p])
        True
        >>> _ = p.grad.zero_()
        >>> held.are_those_of([p])
        False
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._noted = [None if p.grad is None else (weakref.ref(p.grad), p.grad._version) for p in parameters]

    def are_those_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these parameters have the same gradients, and nobody has written to them."""
        for p, noted in zip(parameters, self._noted, strict=True):
            if p.grad is None or noted is None:
                if p.grad is not None or noted is not None:
                    return False
            elif noted[0]() is not p.grad or noted[1] != p.grad._version:
                return False
        return True
