"""Which gradients a direction was computed from, to know whether they are still there."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class HeldGradients:
    """The gradients of some parameters as they are now, by identity: nothing is copied, and none is kept alive.

    Example:
        >>> import torch
        >>> p = torch.ones(2, requires_grad=True)
        >>> p.grad = torch.ones(2)
        >>> held = HeldGradients([p])
        >>> held.are_those_of([p]), held.have_all_of([p])
        (True, True)
        >>> _ = p.grad.zero_()
        >>> held.are_those_of([p]), held.have_all_of([p])
        (False, False)
        >>> p.grad = None
        >>> HeldGradients([p]).are_those_of([p]), HeldGradients([p]).have_all_of([p])
        (True, False)
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        found = {id(p): p.grad for p in parameters if p.grad is not None}
        self._noted: dict[int, tuple[weakref.ref[Tensor] | None, int]] = {
            key: (weakref.ref(gradient), gradient._version) for key, gradient in found.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        """A copy's gradients are others, none of which it knows."""
        return {"_noted": dict.fromkeys(self._noted, (None, 0))}

    def are_those_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these parameters have the same gradients, and nobody has written to them."""
        found = [p for p in parameters if p.grad is not None]
        return len(found) == len(self._noted) and all(map(self._knows, found))

    def have_all_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these parameters have gradients, and none that is new, or was written to since."""
        found = [p for p in parameters if p.grad is not None]
        return bool(found) and all(map(self._knows, found))

    def _knows(self, parameter: Tensor) -> bool:
        reference, version = self._noted.get(id(parameter), (None, 0))
        gradient = parameter.grad
        if reference is None or gradient is None:
            return False
        return reference() is gradient and gradient._version == version
