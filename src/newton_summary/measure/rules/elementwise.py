"""Operations that act on every entry by itself, with derivatives f', f'', f''' as tensors of the value's shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from newton_summary.measure.half import wide
from newton_summary.measure.rules import bessel
from newton_summary.measure.rules.base import Rule, Sums, add_cubes
from newton_summary.measure.rules.call import Call, Place
from newton_summary.measure.rules.derive import apart, jvp
from newton_summary.measure.rules.jets import Groups, Jet, add_rows, blocks, dots, flat, rows_of

aten = torch.ops.aten

Slope: TypeAlias = Tensor | None
"""A derivative, entry by entry; ``None`` where it is zero everywhere."""

Derivatives: TypeAlias = Callable[[Call, int], tuple[Slope, ...]]
"""The derivatives of orders 1 to the given one."""


class Elementwise(Rule):
    """An operation on every entry of its first argument.

    Args:
        derivatives: the operation at work and the highest order to its derivatives by entry.  Default: nested
            forward differentiation.
        piecewise_linear: whether every second derivative is zero.
        steep: whether derivatives near zero overflow, where nothing may move, as behind a length that is clamped; it
            may depend on the call.
    """

    kind = "elementwise"

    def __init__(
        self,
        derivatives: Derivatives | None = None,
        piecewise_linear: bool = False,
        steep: bool | Callable[[Call], bool] = False,
    ) -> None:
        self.derivatives = derivatives or nested
        self.piecewise_linear = piecewise_linear
        self.steep = steep

    @override
    def takes(self, places: set[Place]) -> bool:
        return places == {0}

    @override
    def is_curved(self, call: Call) -> bool:
        return not self.piecewise_linear

    @override
    def push(self, call: Call, adjoint: Any, sums: Sums) -> Any:
        if self.piecewise_linear:
            jet, (slope,) = call.jets[0], self.derivatives(call, 1)
            rows = call.target(len(jet.rows))
            return jet.like(rows.zero_() if slope is None else torch.mul(jet.rows, slope, out=rows))
        return self._bent(call, adjoint, sums)

    def _bent(self, call: Call, adjoint: Tensor | None, sums: Sums) -> Jet:
        """Pushes tangents through a curve: f' ẋ, and f' ẍ + f'' ẋ².

        Adds Σ v̄ f'' ẋ_i ẋ_j to H̄ and Σ v̄ (f''' ẋ_i³ + 3 f'' ẋ_i ẍ_i) to the third diagonal.  Goes in blocks that fit
        a cache, so that the tangents are read from memory once; those of half precision are in single there, for
        squares and cubes of theirs may be no numbers.
        """
        jet, third = call.jets[0], call.third
        n, m = len(jet.first), len(jet.second)
        result = call.target((2 if third else 1) * n)
        rows, new = flat(jet.rows), flat(result)
        v = None if adjoint is None else wide(adjoint.reshape(-1))
        like = wide(rows[:0])
        gram, cubes = like.new_zeros(n, n), like.new_zeros(n)
        place = rows_of(jet.first, jet.second)
        for block, (d1, d2, d3) in self._slopes(call, rows):
            x, a = wide(rows[m:, block]), wide(rows[:m, block])
            if v is not None:
                bent = x * (v[block] * d2)
                gram.addmm_(bent, x.T)
                if third and m:
                    add_rows(cubes, place, 3 * dots(bent[place], a))
            if third:
                square = x * x
                second = new[:n, block]
                if m == n:
                    torch.mul(a, d1, out=second).addcmul_(square, d2)
                else:
                    torch.mul(square, d2, out=second)
                    if m:
                        add_rows(second, place, a * d1)
                if v is not None and d3 is not None:
                    cubes += torch.mv(square.mul_(x), v[block] * d3)
            torch.mul(x, d1, out=new[n:, block] if third else new[:, block])
        if v is not None:
            sums.add_square(jet.first, gram)
            if third:
                sums.add_diagonal(jet.first, cubes)
        return Jet(jet.first if third else (), jet.first, result)

    def _slopes(self, call: Call, rows: Tensor) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Slope]]]:
        """Blocks of entries, and the derivatives of three orders there."""
        point, out = (x.reshape(-1) for x in self._point(call))
        like = wide(rows[:0])
        steep = self.is_steep(call)
        for block in blocks(rows.shape[1], len(rows)):
            here = Call(call.op, (point[block], *call.args[1:]), call.kwargs, out[block], {})
            d1, d2, d3 = (
                None if d is None else d.to(like.dtype)
                for d in (*self.derivatives(here, 3 if call.third else 2), None)[:3]
            )
            zero = like.new_zeros(())
            if steep:
                still = (rows[:, block] == 0).all(0)
                d1, d2, d3 = (None if d is None else d.masked_fill(still, 0.0) for d in (d1, d2, d3))
            yield block, (zero if d1 is None else d1, zero if d2 is None else d2, d3)

    def is_steep(self, call: Call) -> bool:
        """Whether derivatives near zero overflow, where nothing may move."""
        return self.steep(call) if callable(self.steep) else self.steep

    def _point(self, call: Call) -> tuple[Tensor, Tensor]:
        """Where slopes are taken: the argument and the result."""
        return wide(call.args[0]), wide(call.out)

    @override
    def sources(self, call: Call, adjoint: Any) -> dict[Place, tuple[Groups, Tensor]]:
        jet = call.jets[0]
        d2 = self.derivatives(call, 2)[1]
        return {} if d2 is None else {0: (jet.first, jet.dot * (adjoint * d2))}

    @override
    def add_third(self, call: Call, adjoint: Any, moving: Any, groups: Groups, sums: Sums) -> None:
        jet = call.jets[0]
        _, d2, d3 = (*self.derivatives(call, 3), None, None)[:3]
        dot = flat(jet.dot)
        weights = dot.new_zeros(len(groups), dot.shape[1])
        if moving is not None and d2 is not None:
            torch.mul(flat(moving), d2.reshape(-1), out=weights)
        both = tuple(g for g in groups if g in jet.first)
        if adjoint is not None and d3 is not None and both:
            twist = (adjoint * d3).reshape(-1) / 3
            weights[rows_of(groups, both)] += dot[rows_of(jet.first, both)] * twist
        add_cubes(weights, dot, groups, jet.first, sums)


# Derivatives ----------------------------------------------------------------------------------------------------------


def nested(call: Call, order: int) -> tuple[Slope, ...]:
    """Derivatives of any function by forward differentiation of forward differentiation."""

    def value(x: Tensor) -> Any:
        return call.with_arguments({0: x})

    def slope(f: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return lambda x: jvp(f, (x,), (torch.ones_like(x),))[1]

    point = apart(call.args[0].detach())
    results = []
    function: Callable[[Tensor], Any] = value
    for _ in range(order):
        function = slope(function)
        results.append(function(point))
    return tuple(results)


def _tanh(call: Call, order: int) -> tuple[Slope, ...]:
    y = call.out
    d1 = 1 - y * y
    if order == 1:
        return (d1,)
    d2 = -2 * y * d1
    return (d1, d2) if order == 2 else (d1, d2, -2 * d1 * (1 - 3 * y * y))


def _sigmoid(call: Call, order: int) -> tuple[Slope, ...]:
    y = call.out
    d1 = y * (1 - y)
    if order == 1:
        return (d1,)
    d2 = d1 * (1 - 2 * y)
    return (d1, d2) if order == 2 else (d1, d2, d1 * (1 - 6 * d1))


def _exp(call: Call, order: int) -> tuple[Slope, ...]:
    return (call.out,) * order


def _power(exponent: float, call: Call, order: int) -> tuple[Slope, ...]:
    x = call.args[0]
    slopes: list[Slope] = []
    factor = 1.0
    for k in range(order):
        factor *= exponent - k
        slopes.append(None if factor == 0 else factor * x.pow(exponent - k - 1))
    return tuple(slopes)


def power(exponent: float) -> Derivatives:
    """The derivatives of a power."""
    return lambda call, order: _power(exponent, call, order)


def _pow_scalar(call: Call, order: int) -> tuple[Slope, ...]:
    return _power(call.args[1], call, order)


def _is_steep_power(call: Call) -> bool:
    return call.args[1] < 3 and call.args[1] not in (0, 1, 2)


def _log(call: Call, order: int) -> tuple[Slope, ...]:
    r = call.args[0].reciprocal()
    return (r, -r.square(), 2 * r.pow(3))[:order]


def _sin(call: Call, order: int) -> tuple[Slope, ...]:
    x = call.args[0]
    cos = x.cos()
    return (cos, -call.out, -cos)[:order]


def _cos(call: Call, order: int) -> tuple[Slope, ...]:
    sin = call.args[0].sin()
    return (-sin, -call.out, sin)[:order]


def _relu(call: Call, order: int) -> tuple[Slope, ...]:
    return ((call.out > 0).to(call.out.dtype),)


def _elu(call: Call, order: int) -> tuple[Slope, ...]:
    x = call.args[0]
    alpha, scale, slope = [*call.args[1:], 1.0, 1.0, 1.0][:3]
    below = torch.where(x > 0, 0.0, alpha * scale * slope * torch.exp(torch.clamp(x, max=0.0) * slope))
    first = torch.where(x > 0, scale, below)
    bent = torch.where(x < 0, slope * below, 0.0)  # as torch has it: at zero itself it is straight
    return (first, bent, slope * bent)[:order]


def _silu(call: Call, order: int) -> tuple[Slope, ...]:
    x = call.args[0]
    s = torch.sigmoid(x)
    s1 = s * (1 - s)
    s2 = s1 * (1 - 2 * s)
    return (s + x * s1, 2 * s1 + x * s2, 3 * s2 + x * s1 * (1 - 6 * s1))[:order]


def _gelu(call: Call, order: int) -> tuple[Slope, ...]:
    x = call.args[0]
    if call.kwargs.get("approximate", "none") != "none":
        return _gelu_by_tanh(x, order)
    density = torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    square = x * x
    first = 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density
    return (first, (2 - square) * density, (square - 4) * x * density)[:order]


def _gelu_by_tanh(x: Tensor, order: int) -> tuple[Slope, ...]:
    """Of x (1 + tanh u) / 2, with u a cubic polynomial of x."""
    k, c = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    u1, u2, u3 = k * (1 + 3 * c * square), 6 * k * c * x, 6 * k * c
    t = torch.tanh(k * x * (1 + c * square))
    s = 1 - t * t
    t1 = s * u1
    bend = u2 - 2 * t * u1 * u1
    t2 = s * bend
    first = 0.5 * (1 + t + x * t1)
    if order < 3:
        return (first, t1 + 0.5 * x * t2)[:order]
    t3 = s * (u3 - 2 * t1 * u1 * u1 - 4 * t * u1 * u2) - 2 * t * t1 * bend
    return (first, t1 + 0.5 * x * t2, 1.5 * t2 + 0.5 * x * t3)


def _softplus(call: Call, order: int) -> tuple[Slope, ...]:
    x = call.args[0]
    given = call.args[1:]
    beta = given[0] if given else 1.0
    threshold = given[1] if len(given) > 1 else 20.0
    s = torch.where(beta * x > threshold, 1.0, torch.sigmoid(beta * x))
    d2 = torch.where(beta * x < threshold, beta * s * (1 - s), 0.0)
    return (s, d2, beta * d2 * (1 - 2 * s))[:order]


def _log1p(call: Call, order: int) -> tuple[Slope, ...]:
    r = (1 + call.args[0]).reciprocal()
    return (r, -r.square(), 2 * r.pow(3))[:order]


def _logarithm(base: float, call: Call, order: int) -> tuple[Slope, ...]:
    return tuple(None if d is None else d / math.log(base) for d in _log(call, order))


def _exp2(call: Call, order: int) -> tuple[Slope, ...]:
    return tuple(call.out * math.log(2) ** k for k in range(1, order + 1))


def _erf(sign: int, call: Call, order: int) -> tuple[Slope, ...]:
    x = call.args[0]
    bell = torch.exp(-x * x) * (sign * 2 / math.sqrt(math.pi))
    return (bell, -2 * x * bell, (4 * x * x - 2) * bell)[:order]


def _tan(call: Call, order: int) -> tuple[Slope, ...]:
    square = call.out.square()
    d1 = 1 + square
    return (d1, 2 * call.out * d1, 2 * d1 * (1 + 3 * square))[:order]


def _atan(call: Call, order: int) -> tuple[Slope, ...]:
    x = call.args[0]
    r = (1 + x * x).reciprocal()
    return (r, -2 * x * r * r, (6 * x * x - 2) * r.pow(3))[:order]


def _atanh(call: Call, order: int) -> tuple[Slope, ...]:
    x = call.args[0]
    r = (1 - x * x).reciprocal()
    return (r, 2 * x * r * r, 2 * r * r * (1 + 4 * x * x * r))[:order]


def _inverse(outer: int, inner: int, call: Call, order: int) -> tuple[Slope, ...]:
    """Of a function with slope ±1/√q, where q = ``outer`` x² + ``inner``."""
    x = call.args[0]
    r = (outer * x * x + inner).rsqrt()
    cube = r.pow(3)
    return (r, -outer * x * cube, cube * (3 * x * x * r * r - outer))[:order]


def _negated(derivatives: Derivatives, call: Call, order: int) -> tuple[Slope, ...]:
    return tuple(None if d is None else -d for d in derivatives(call, order))


def _gammas(first: int, call: Call, order: int) -> tuple[Slope, ...]:
    return tuple(torch.special.polygamma(first + k, call.args[0]) for k in range(order))


def _hardswish(call: Call, order: int) -> tuple[Slope, ...]:
    x = call.args[0]
    inside = (x > -3) & (x < 3)
    d1 = torch.where(inside, x / 3 + 0.5, (x >= 3).to(x.dtype))
    return (d1, inside.to(x.dtype) / 3, None)[:order]


TABLE: dict[Any, Elementwise] = {
    aten.tanh.default: Elementwise(_tanh),
    aten.sigmoid.default: Elementwise(_sigmoid),
    aten.exp.default: Elementwise(_exp),
    aten.expm1.default: Elementwise(lambda call, order: (call.out + 1,) * order),
    aten.log.default: Elementwise(_log, steep=True),
    aten.sin.default: Elementwise(_sin),
    aten.cos.default: Elementwise(_cos),
    aten.square.default: Elementwise(power(2)),
    aten.sqrt.default: Elementwise(power(0.5), steep=True),
    aten.rsqrt.default: Elementwise(power(-0.5), steep=True),
    aten.reciprocal.default: Elementwise(power(-1), steep=True),
    aten.pow.Tensor_Scalar: Elementwise(_pow_scalar, steep=_is_steep_power),
    aten.elu.default: Elementwise(_elu),
    aten.silu.default: Elementwise(_silu),
    aten.gelu.default: Elementwise(_gelu),
    aten.relu.default: Elementwise(_relu, piecewise_linear=True),
}
TABLE |= {
    op: Elementwise(piecewise_linear=True)
    for op in (
        aten.leaky_relu.default,
        aten.hardtanh.default,
        aten.threshold.default,
        aten.abs.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.clamp_max.default,
        aten.relu6.default,
    )
}
_MORE: dict[Any, Derivatives] = {
    aten.log1p.default: _log1p,
    aten.log2.default: functools.partial(_logarithm, 2),
    aten.log10.default: functools.partial(_logarithm, 10),
    aten.exp2.default: _exp2,
    aten.softplus.default: _softplus,
    aten.erf.default: functools.partial(_erf, 1),
    aten.erfc.default: functools.partial(_erf, -1),
    aten.atan.default: _atan,
    aten.asin.default: functools.partial(_inverse, -1, 1),
    aten.acos.default: functools.partial(_negated, functools.partial(_inverse, -1, 1)),
    aten.sinh.default: lambda call, order: (call.args[0].cosh(), call.out, call.args[0].cosh())[:order],
    aten.cosh.default: lambda call, order: (call.args[0].sinh(), call.out, call.args[0].sinh())[:order],
    aten.asinh.default: functools.partial(_inverse, 1, 1),
    aten.acosh.default: functools.partial(_inverse, 1, -1),
    aten.atanh.default: _atanh,
    aten.tan.default: _tan,
    aten.lgamma.default: functools.partial(_gammas, 0),
    aten.digamma.default: functools.partial(_gammas, 1),
    aten.hardswish.default: _hardswish,
    aten.i0.default: bessel.I0,
    aten.special_i0e.default: bessel.I0E,
    aten.special_i1.default: bessel.I1,
    aten.special_i1e.default: bessel.I1E,
}
TABLE |= {op: Elementwise(derivatives) for op, derivatives in _MORE.items()}
TABLE[aten.abs.default] = Elementwise(lambda call, order: (call.args[0].sign(),), piecewise_linear=True)
