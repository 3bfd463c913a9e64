"""Second derivatives by differences of gradients: what autograd makes of them is held to that (docs/engine.md).

Autograd differentiates a gradient by going through the operations that made it.  Where some of them were hidden from it
(a backward pass that computes with constants, in another library, or with a formula that lacks a term), it leaves terms
out without a word.  Differences of the gradient itself do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.loss import Loss, gradients_of
from newton_summary.partition import Partition

_STEP = 1e-6  # of the parameters' length
_COARSE_STEP = 1e-2  # in single precision, where only smooth losses can be told from rounding
_TOLERANCE = 1e-4
_COARSE_TOLERANCE = 1e-2
_DOUBT = 10.0  # how many times what differences disagree among themselves
_ROUNDING = 1e3


class Differences:
    """Central differences of a loss and its gradient along u, at three distances.

    Args:
        loss: the loss and its model.
        batch: what it is measured on.
        partition: S groups.
        direction: u, one tensor for each parameter of the partition.
        rewind: restores the random states that the loss was measured with.

    Attributes:
        slopes: the derivative of the loss along u, at each distance.
        rows: (3, S), H̄ times ones at each distance.
    """

    def __init__(
        self, loss: Loss, batch: Any, partition: Partition, direction: Sequence[Tensor], rewind: Callable[[], None]
    ) -> None:
        step = (_STEP if is_exact(partition) else _COARSE_STEP) * _ratio(partition.parameters, direction)
        slopes, rows, rounding = [], [], 0.0
        with loss.movable(batch, partition, rewind) as (moved, _), torch.enable_grad():
            start = [p.clone() for p in moved]
            for distance in (step, 2 * step, 4 * step):
                ends = []
                for sign in (1, -1):
                    with torch.no_grad():
                        for p, p0, u in zip(moved, start, direction, strict=True):
                            p.copy_(p0).add_(u, alpha=sign * distance)
                    rewind()
                    with loss.evaluated(batch) as value:
                        gradient = gradients_of(value, partition.parameters)
                        ends.append((value.item(), torch.stack(partition.dot(gradient, direction)).double()))
                (a, x), (b, y) = ends
                slopes.append((a - b) / (2 * distance))
                rows.append((x - y) / (2 * distance))
                rounding = max(rounding, float(x.abs().sum()) / step, float(y.abs().sum()) / step)
        self._tolerance = _TOLERANCE if is_exact(partition) else _COARSE_TOLERANCE
        self.slopes, self.rows = slopes, torch.stack(rows)
        eps = torch.finfo(torch.float64 if is_exact(partition) else torch.float32).eps
        self._rounding = _ROUNDING * eps * rounding

    def is_slope(self, slope: float, size: float) -> bool:
        """Whether the derivative of the loss along u may be this, for terms of some size: whether a gradient is one."""
        if not all(map(math.isfinite, (slope, *self.slopes))):
            return False
        doubt = max(self.slopes) - min(self.slopes)
        return abs(self.slopes[0] - slope) <= 0.01 * self._tolerance * size + _DOUBT * doubt

    def worst(self, rows: Tensor) -> int | None:
        """The group whose sum of second derivatives cannot be this; nothing where all can.

        Args:
            rows: (S,), H̄ times ones.
        """
        if not bool(self.rows.isfinite().all() & rows.isfinite().all()):
            return None
        doubt = float((self.rows.amax(0) - self.rows.amin(0)).norm())
        size = float(torch.maximum(rows.abs(), self.rows[0].abs()).max())
        excess = (rows - self.rows[0]).abs()
        is_off = bool(excess.max() > self._tolerance * size + _DOUBT * doubt + self._rounding)
        return int(excess.argmax()) if is_off else None


def is_exact(partition: Partition) -> bool:
    """Whether all parameters are of double precision."""
    return all(p.dtype in (torch.float64, torch.complex128) for p in partition.parameters)


def mismatch(differences: Callable[[], Differences], gradient: Tensor, hessian: Tensor) -> int | None:
    """The group whose second derivatives are not those of the gradient that a loss has; nothing where all may be.

    Where the gradient is not the loss's own, as behind ``detach`` and straight-through estimators, a constant stands
    for what moves, in every order: differences know nothing of that, and are not asked.

    Args:
        differences: finds them.
        gradient: (S,), the first derivatives.
        hessian: (S, S), the second ones.
    """
    if not bool(gradient.isfinite().all() & hessian.isfinite().all()) or not bool(gradient.any()):
        return None
    try:
        found = differences()
    except (RuntimeError, ValueError, ArithmeticError):  # the loss does not bear other parameters
        return None
    if not found.is_slope(float(gradient.sum()), float(gradient.abs().sum())):
        return None
    return found.worst(hessian.sum(1))


def _ratio(parameters: Sequence[Tensor], direction: Sequence[Tensor]) -> float:
    """How often the direction fits into the parameters."""
    size, length = (
        math.sqrt(sum(float(torch.linalg.vector_norm(t.detach(), dtype=_wide(t))) ** 2 for t in tensors))
        for tensors in (parameters, direction)
    )
    return max(size, 1e-3) / max(length, 1e-30)


def _wide(t: Tensor) -> torch.dtype:
    return torch.complex128 if t.is_complex() else torch.float64
