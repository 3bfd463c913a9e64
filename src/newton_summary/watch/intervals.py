"""The factor on one group's rate that is best when all others stand still, and between which bounds it surely is.

An interval inverts a t-test of the slope of the group's cubic model (Fieller's method, with a cubic term).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from newton_summary.summary import Summary

Array: TypeAlias = NDArray[Any]

_REACH = 1e6  # an interval is searched this far on both sides of its scale; beyond lie 0 and infinity
_GRID = 400
_HALVINGS = 55


def best(summary: Summary, regularization: float) -> Array:
    """The minimiser over η ≥ 0 of each group's cubic model, shape (S,), by a quadratic formula free of cancellation."""
    gradient, curvature, cubic = _own_terms(summary, regularization)
    root = _root(curvature, cubic, np.maximum(gradient, 0))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # where nothing limits a step, infinity
        bent = 2 * gradient / (curvature + root)
        straight = (root - curvature) / (2 * cubic)  # where curvature is negative
    found = np.where(curvature >= 0, bent, straight)
    return np.where(gradient > 0, found, 0.0)


def _root(curvature: Array, cubic: Array, slope: Array) -> Array:
    """The root in the quadratic formula, √(H² + 4 c g), of numbers whose squares may be none any more."""
    result: Array = np.hypot(curvature, 2 * np.sqrt(cubic) * np.sqrt(slope))
    return result


def _own_terms(summary: Summary, regularization: float) -> tuple[Array, Array, Array]:
    """ḡ_s, H̄_ss and (λ_int / 2) |D_sss|: the slope of group s at η is ḡ_s − H̄_ss η − (λ_int / 2) |D_sss| η²."""
    third = summary.third_diagonal
    gradient, curvature = summary.gradient.numpy(), summary.tensor(2).diagonal().numpy()
    cubic = np.zeros_like(gradient) if third is None else regularization / 2 * third.abs().numpy()
    return gradient, curvature, cubic


def slopes_of(parts: Sequence[Summary], mean: Summary, regularization: float) -> Array:
    """For each batch and group the coefficients of its slope, a polynomial in η: shape (batches, S, 3).

    The sign of the third derivative is that of the mean, so that the mean of the slopes is the slope of the mean.
    """
    rows = []
    sign = 1.0 if mean.third_diagonal is None else torch.where(mean.third_diagonal < 0, -1.0, 1.0)
    for part in parts:
        third = torch.zeros_like(part.gradient) if part.third_diagonal is None else part.third_diagonal
        rows.append(torch.stack([part.gradient, -part.tensor(2).diagonal(), -regularization / 2 * sign * third], 1))
    return torch.stack(rows).numpy()


def intervals(slopes: Array, weights: Array, centre: Array, level: float) -> tuple[Array, Array]:
    """Both ends of each group's interval, shape (S,); NaN from a single batch.

    A batch of n samples counts n times, and varies by 1/n as much as one sample does: weighted least squares.

    They are the nearest points on both sides of the centre, the root of the mean slope, from which on the slope is
    surely positive (below) or surely negative (above); where there is none, 0 and infinity.
    """
    count = len(slopes)
    if count < 2:
        return np.full_like(centre, np.nan), np.full_like(centre, np.nan)
    sizes = np.abs(slopes).max(axis=(0, 2), keepdims=True)
    slopes = np.divide(slopes, sizes, out=np.zeros_like(slopes), where=sizes > 0)  # so that squares are numbers
    shares = weights / weights.sum()
    mean = np.einsum("b,bsi->si", shares, slopes)
    deviations = slopes - mean
    covariance = np.einsum("b,bsi,bsj->sij", shares, deviations, deviations) / (count - 1)
    spread = covariance * quantile(level, count) ** 2
    test, scale = _Test.of(mean, spread), _scale(mean, spread)
    known = (scale > 0) & np.isfinite(scale)
    grid = np.where(known, scale, 1.0)[:, None] * np.geomspace(1 / _REACH, _REACH, _GRID)
    grid = np.concatenate([np.zeros((len(grid), 1)), grid, np.full((len(grid), 1), np.inf)], 1)
    with np.errstate(invalid="ignore", over="ignore"):  # at infinity nothing is sure
        high = test.end(grid, centre, -1.0)
        low = test.end(grid[:, ::-1], centre, 1.0)
    low = np.where(centre == 0, 0.0, low)
    return np.where(known, low, centre), np.where(known, high, centre)


@dataclass(frozen=True)
class _Test:
    """A t-test of the sign of the slope at η, for all groups at once: both it and its variance are polynomials in η.

    Args:
        mean: the coefficients of the slope, each of shape (S, 1), the constant first.
        variance: those of its variance times the square of the t-quantile.
    """

    mean: Sequence[Array]
    variance: Sequence[Array]

    @staticmethod
    def of(mean: Array, spread: Array) -> _Test:
        """From the slope's coefficients, shape (S, 3), and their covariance times that square, shape (S, 3, 3)."""
        sums = [sum(spread[:, i, k - i] for i in range(3) if 0 <= k - i < 3) for k in range(5)]
        return _Test([c[:, None] for c in mean.T], [np.asarray(c)[:, None] for c in sums])

    def is_sure(self, eta: Array, sign: float) -> Array:
        """Whether the slope at η, shape (S, n), is surely of this sign."""
        slope = sign * _polynomial(self.mean, eta)
        result: Array = slope > np.sqrt(np.maximum(_polynomial(self.variance, eta), 0.0))
        return result

    def end(self, grid: Array, centre: Array, sign: float) -> Array:
        """The first point beyond the centre where the slope is surely of this sign, shape (S,).

        Args:
            grid: points to look at, shape (S, n), in the order in which to look; the last is where the axis ends.
            centre: where the interval begins, shape (S,).
            sign: −1 on the way up, +1 on the way down.
        """
        beyond = (grid >= centre[:, None]) if sign < 0 else (grid <= centre[:, None])
        found = self.is_sure(grid, sign) & beyond
        rows, first = np.arange(len(grid)), found.argmax(1)
        outside = grid[rows, first]
        before = np.maximum(first - 1, 0)
        inside = np.where(beyond[rows, before], grid[rows, before], centre)
        unlimited = np.isinf(inside)
        for _ in range(_HALVINGS):
            middle = np.where(unlimited, outside, (outside + inside) / 2)
            sure = self.is_sure(middle[:, None], sign)[:, 0]
            outside, inside = np.where(sure, middle, outside), np.where(sure, inside, middle)
        return np.where(found.any(1), np.where(unlimited, np.inf, inside), grid[:, -1])


def _polynomial(coefficients: Sequence[Array], x: Array) -> Array:
    """Σ_k c_k x^k at points of shape (S, n)."""
    *lower, value = coefficients
    for coefficient in reversed(lower):
        value = value * x + coefficient
    return value


def quantile(level: float, count: int) -> float:
    """How many standard errors a mean of this many batches may be from the truth at this level (Student's t)."""
    from scipy import special  # here, because it takes long to import

    return float(special.stdtrit(count - 1, (1 + level) / 2))


def _scale(mean: Array, spread: Array) -> Array:
    """A step size for each group that moves with its units: where its slope is used up by curvature, sizes for both."""
    slope, curvature, cubic = (np.abs(mean) + np.sqrt(np.einsum("sii->si", spread))).T
    bottom = curvature + _root(curvature, cubic, slope)
    result: Array = np.divide(2 * slope, bottom, out=np.full_like(slope, np.inf), where=bottom > 0)
    return result
