"""Derivatives of the modified Bessel functions I₀ and I₁, by entry.

The usual formulas divide by x: they lose all digits towards zero, where torch's own third derivative of I₁ is 0.  All
here is in units of exp(|x|), so that nothing overflows.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from newton_summary.measure.rules.call import Call

_TERMS = 10  # of the series below one
_SERIES = [1 / (math.factorial(k) * math.factorial(k + 1) * 2 ** (2 * k + 1)) for k in range(_TERMS)]
"""The factors of x, x³, x⁵, … in I₁."""


def bessel(first: int, scaled: bool, call: Call, order: int) -> tuple[Tensor, ...]:
    """The derivatives of I₀ (``first`` is 0) or I₁, or of these times exp(−|x|)."""
    x = call.args[0]
    values = [torch.special.i0e(x), torch.special.i1e(x), *_slopes_of_i1(x)]  # each the derivative of the one before
    f, *slopes = values[first : first + 4]
    if not scaled:
        return tuple(slope * x.abs().exp() for slope in slopes[:order])
    side = x.sign()
    sides = side.square()
    d1, d2, d3 = slopes
    return (d1 - side * f, d2 - 2 * side * d1 + sides * f, d3 - 3 * side * d2 + 3 * sides * d1 - side * f)[:order]


def _slopes_of_i1(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """I₁', I₁'' and I₁''', in units of exp(|x|): by I₀ and q = I₁ / x, and by their series towards zero."""
    is_small = x.abs() < 1
    far, near = torch.where(is_small, 1.0, x), torch.where(is_small, x, 0.0)
    i0, i1 = torch.special.i0e(far), torch.special.i1e(far)
    d1 = i0 - i1 / far
    q1 = (d1 - i1 / far) / far
    d2 = i1 - q1
    d3 = d1 - (d2 - 2 * q1) / far
    slopes = []
    for number, slope in enumerate((d1, d2, d3), 1):
        terms = [(2 * k + 1 - number, math.perm(2 * k + 1, number) * c) for k, c in enumerate(_SERIES)]
        series = sum(factor * near**power for power, factor in terms if power >= 0)
        slopes.append(torch.where(is_small, series * (-near.abs()).exp(), slope))
    return slopes[0], slopes[1], slopes[2]


I0, I1 = functools.partial(bessel, 0, False), functools.partial(bessel, 1, False)
I0E, I1E = functools.partial(bessel, 0, True), functools.partial(bessel, 1, True)
