"""Derivatives by differences: what autograd makes of a loss is held to that (docs/engine.md).

Autograd differentiates a gradient by going through the operations that made it.  Where some of them were hidden from it
(a backward pass that computes with constants, in another library, or with a formula that lacks a term), it leaves terms
out without a word.  Differences of the gradient itself do not.

All differences are along one line, on which every group moves at a rate of its own: what is wrong in two groups does
not cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.half import HALF
from newton_summary.measure.loss import Loss
from newton_summary.partition import Partition

_DOUBT = 10.0  # how many times what differences disagree among themselves
_ROUNDING = 1e3
_GOLDEN = (math.sqrt(5) - 1) / 2
DISTANCES = (1, 2, 4)
"""In steps, on either side."""


@dataclass(frozen=True)
class Precision:
    """How differences are taken, and what is held to them.

    Attributes:
        eps: of the type that losses and gradients are computed in.
        step: of the parameters' length, for second derivatives and for whether a gradient is one.
        second_step: the same for third derivatives, from differences of differences.
        slope: how far a slope may be off, of the size of its terms.
        tolerance: how far higher derivatives may be, of the largest.
    """

    eps: float
    step: float
    second_step: float
    slope: float
    tolerance: float


DOUBLE = Precision(2.3e-16, 1e-6, 1e-3, 1e-7, 1e-5)
SINGLE = Precision(1.2e-7, 1e-2, 3e-2, 1e-4, 1e-2)
"""Only smooth losses can then be told from rounding."""
QUICK = replace(SINGLE, step=1e-3, slope=2e-3)
"""To see that a gradient is one, not that it is none."""
SINGLE_BY_DOUBLE = replace(DOUBLE, slope=2e-3, tolerance=1e-2)
"""What was computed in single precision, by differences in double."""
KINKED_BY_DOUBLE = replace(DOUBLE, slope=2e-2, tolerance=5e-2)
"""The same, where rounding moves a few values across a kink."""


def rates(count: int) -> list[float]:
    """How fast each group moves along the line: between 0.5 and 1.5, no two of them the same; one alone at 1."""
    return [0.5 + (0.5 + s * _GOLDEN) % 1 for s in range(count)]


def ratio(parameters: Sequence[Tensor], direction: Sequence[Tensor]) -> float:
    """How often the direction fits into the parameters."""
    size, length = (
        math.sqrt(sum(float(torch.linalg.vector_norm(t.detach(), dtype=_wide(t))) ** 2 for t in tensors))
        for tensors in (parameters, direction)
    )
    return max(size, 1e-3) / max(length, 1e-30)


def _wide(t: Tensor) -> torch.dtype | None:
    """The type to find the length of a tensor in: its own, unless squares may not fit there."""
    return torch.float32 if t.dtype in HALF else None


class Slope:
    """The derivative of a function of one number at 0, by central differences.

    Args:
        values: of the function, at some distances in steps: 0 and ±1, and others.
        step: how long one is.
        precision: of the values, and of what is held to them.
    """

    def __init__(self, values: Mapping[int, float], step: float, precision: Precision) -> None:
        self.is_finite = 0 < step < math.inf and all(math.isfinite(v) for v in values.values())
        if not self.is_finite:  # differences tell nothing
            step = math.nan
        slopes = [(values[k] - values[-k]) / (2 * k * step) for k in DISTANCES if k in values]
        self.value = slopes[0]
        self._doubt = _DOUBT * (max(slopes) - min(slopes))
        self._tolerance = precision.slope
        # a kink at 0 itself: there is no slope, and what autograd takes for it is a convention
        self._jump = abs(values[1] - 2 * values[0] + values[-1]) / step
        self._rounding = _ROUNDING * precision.eps * max(abs(v) for v in values.values()) / step

    def may_be(self, slope: float, size: float) -> bool:
        """Whether differences agree with a slope.

        Args:
            slope: what it is said to be.
            size: of the terms whose sum that is.
        """
        return self.is_finite and abs(self.value - slope) <= self._tolerance * size + self._doubt

    def excludes(self, slope: float, size: float) -> bool:
        """Whether it is surely something else, not by rounding, nor at a kink."""
        allowed = self._tolerance * size + self._doubt + self._jump + self._rounding
        return self.is_finite and math.isfinite(slope) and abs(self.value - slope) > allowed


class Differences:
    """Central differences of a gradient along the line, at three distances.

    Args:
        losses: the loss, by the distance in steps: 0, ±1, ±2 and ±4.
        slopes: (S,), those of the groups, in the same way.
        step: how long one is.
        precision: of these, and of what is held to them.
        order: of the derivatives that are wanted, 2 or 3.

    Attributes:
        slope: of the loss.
        rows: (3, S), derivatives of that order by each group and along the line, at each distance.
    """

    def __init__(
        self,
        losses: Mapping[int, float],
        slopes: Mapping[int, Tensor],
        step: float,
        precision: Precision,
        order: int = 2,
    ) -> None:
        self.slope = Slope(losses, step, precision)
        step = step if 0 < step < math.inf else math.nan  # differences tell nothing
        if order == 2:
            found = [(slopes[k] - slopes[-k]) / (2 * k * step) for k in DISTANCES]
        else:
            found = [(slopes[k] - 2 * slopes[0] + slopes[-k]) / (k * step) ** 2 for k in DISTANCES]
        self.rows = torch.stack(found)
        self._tolerance = precision.tolerance
        largest = max(float(x.abs().sum()) for x in slopes.values())
        self._rounding = _ROUNDING * precision.eps * largest / step ** (order - 1)

    def worst(self, rows: Tensor) -> int | None:
        """The group whose derivatives along the line cannot be these; nothing where all can.

        Args:
            rows: (S,), such as H̄ times the groups' rates.
        """
        if not bool(self.rows.isfinite().all() & rows.isfinite().all()):
            return None
        doubt = float((self.rows.amax(0) - self.rows.amin(0)).norm())
        size = float(torch.maximum(rows.abs(), self.rows[0].abs()).max())
        excess = (rows - self.rows[0]).abs()
        is_off = bool(excess.max() > self._tolerance * size + _DOUBT * doubt + self._rounding)
        return int(excess.argmax()) if is_off else None


def differences_of(
    loss: Loss,
    batch: Any,
    partition: Partition,
    direction: Sequence[Tensor],
    rewind: Callable[[], None],
    order: int = 2,
) -> Differences:
    """Differences of the gradient of a loss.

    Args:
        loss: the loss and its model.
        batch: what it is measured on.
        partition: S groups.
        direction: u, one tensor for each parameter of the partition.
        rewind: restores the random states that the loss was measured with.
        order: of the derivatives, 2 or 3.
    """
    precision = DOUBLE if is_exact(partition) else SINGLE
    length = precision.step if order == 2 else precision.second_step
    step = length * ratio(partition.parameters, direction)
    losses, slopes = {}, {}
    factors = partition.spread(rates(len(partition)))
    with loss.movable(batch, partition, rewind, alike=False) as (moved, here):
        start = [p.clone() for p in moved]
        for k in (0, *DISTANCES, *(-k for k in DISTANCES)):
            for p, p0, u, f in zip(moved, start, direction, factors, strict=True):
                p.copy_(p0).add_(u * f, alpha=k * step)
            losses[k], gradient = here.gradient()
            slopes[k] = torch.stack(partition.dot(gradient, direction)).double()
    return Differences(losses, slopes, step, precision, order)


def is_exact(partition: Partition) -> bool:
    """Whether all parameters are of double precision."""
    return all(p.dtype in (torch.float64, torch.complex128) for p in partition.parameters)


def mismatch(
    differences: Callable[[int], Differences], gradient: Tensor, rows: Mapping[int, Tensor]
) -> tuple[int, int] | None:
    """The order and the group of derivatives that are not those of the gradient that a loss has; nothing where all may.

    Where the gradient is not the loss's own, as behind ``detach`` and straight-through estimators, a constant stands
    for what moves, in every order: differences know nothing of that, and are not asked.

    Args:
        differences: finds them, for an order.
        gradient: (S,), the first derivatives, each times its group's rate.
        rows: by the order, (S,), derivatives by each group and along the line.
    """
    if not all(bool(x.isfinite().all()) for x in (gradient, *rows.values())) or not bool(gradient.any()):
        return None
    for order, row in rows.items():
        try:
            found = differences(order)
        except (RuntimeError, ValueError, ArithmeticError):  # the loss does not bear other parameters
            return None
        if not found.slope.may_be(float(gradient.sum()), float(gradient.abs().sum())):
            return None
        worst = found.worst(row)
        if worst is not None:
            return order, worst
    return None
