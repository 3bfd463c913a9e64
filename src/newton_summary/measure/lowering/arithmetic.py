"""Arithmetic, means and deviations, and functions whose usual formulas have a kink where they themselves have none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.lowering.algebra import root
from newton_summary.measure.lowering.complex_numbers import power as complex_power
from newton_summary.measure.lowering.table import CONSTANT, as_it_is, aten, in_one_type, lowers, same_type

_SHARES_TIES = torch.__version__ >= "2.14"
"""Whether both of two equal numbers have half of the slope of ``fmax`` and ``fmin``; before, the first had all."""


@lowers(aten.div.Tensor)
def _div(x: Tensor, y: Any) -> Any:
    """A quotient of tensors as a product."""
    if isinstance(y, complex):
        return x * (1 / y)
    if not isinstance(y, Tensor):
        return NotImplemented
    if not y.is_floating_point() and not y.is_complex():
        y = y.to(x.dtype if x.is_floating_point() else torch.get_default_dtype())
    if not y.is_complex():
        y = y.to(torch.result_type(x, y).to_real())  # its reciprocal has as many digits as the quotient
    return x * y.reciprocal()


@lowers(aten.maximum.default)
def _maximum(x: Tensor, y: Tensor) -> Any:
    if not x.is_floating_point():
        return NotImplemented
    return torch.where(x == y, (x + y) / 2, torch.where(x > y, x, y))


@lowers(aten.minimum.default)
def _minimum(x: Tensor, y: Tensor) -> Any:
    if not x.is_floating_point():
        return NotImplemented
    return torch.where(x == y, (x + y) / 2, torch.where(x < y, x, y))


@lowers(aten.fmax.default)
def _fmax(x: Tensor, y: Tensor) -> Tensor:
    x, y = in_one_type(x, y)
    larger = torch.where((x >= y) | y.isnan(), x, y)
    return torch.where(x == y, (x + y) / 2, larger) if _SHARES_TIES else larger


@lowers(aten.fmin.default)
def _fmin(x: Tensor, y: Tensor) -> Tensor:
    x, y = in_one_type(x, y)
    smaller = torch.where((x <= y) | y.isnan(), x, y)
    return torch.where(x == y, (x + y) / 2, smaller) if _SHARES_TIES else smaller


@lowers(aten.log_sigmoid_forward.default)
def _log_sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    """min(x, 0) − log(1 + exp(−|x|)), of which each side is written so that it holds at zero, too."""
    is_positive = x > 0
    return torch.where(is_positive, 0.0, x) - torch.where(is_positive, -x, x).exp().log1p(), x.new_zeros(0)


@lowers(aten.logaddexp.default)
def _logaddexp(x: Tensor, y: Tensor) -> Any:
    """The larger of two numbers, and by how much their sum is more; of two that are −∞, a constant."""
    x, y = in_one_type(x, y)
    if x.is_complex():
        return NotImplemented
    is_void = (x == y) & x.isinf()
    fixed = as_it_is(aten.logaddexp.default, CONSTANT(x), CONSTANT(y))
    x, y = (torch.where(is_void, 0.0, v) for v in (x, y))
    is_first = x >= y
    larger, smaller = torch.where(is_first, x, y), torch.where(is_first, y, x)
    return torch.where(is_void, fixed, larger + (smaller - larger).exp().log1p())


@lowers(aten.logcumsumexp.default)
def _logcumsumexp(x: Tensor, dim: int) -> Any:
    """All entries so far, each taking in 1, 2, 4, … of those before: torch's own tangents lack digits of small ones."""
    if x.is_complex():
        return NotImplemented
    length, reach = x.shape[dim] if x.dim() else 1, 1
    while reach < length:
        ahead = length - reach
        further = torch.logaddexp(x.narrow(dim, reach, ahead), x.narrow(dim, 0, ahead))
        x = torch.cat([x.narrow(dim, 0, reach), further], dim)
        reach *= 2
    return x.clone()


@lowers(aten.special_log_ndtr.default)
def _log_ndtr(x: Tensor) -> Tensor:
    """Log Φ(x), in two pieces as torch has it, neither of which sees what overflows there and belongs to the other."""
    is_low = x < -1
    low = torch.where(is_low, x, -1.0) / math.sqrt(2)
    high = torch.where(is_low, 0.0, x) / math.sqrt(2)
    tail = (torch.special.erfcx(-low) / 2).log() - low.square()
    return torch.where(is_low, tail, torch.log1p(torch.erfc(high) / -2))


@lowers(aten.atan2.default)
def _atan2(y: Tensor, x: Tensor) -> Tensor:
    """The angle of a constant point, and that by which it has turned since, which is none; at zero a constant."""
    y, x = in_one_type(y, x)
    fixed_y, fixed_x = CONSTANT(y), CONSTANT(x)
    length = torch.hypot(fixed_y, fixed_x)
    is_zero = length == 0
    length = torch.where(is_zero, 1.0, length)
    sine, cosine = fixed_y / length, fixed_x / length
    along = torch.where(is_zero, 1.0, x * cosine + y * sine)
    turned = ((y * cosine - x * sine) / along).atan()
    return as_it_is(aten.atan2.default, fixed_y, fixed_x) + turned  # type: ignore[no-any-return]


@lowers(aten.sinc.default)
def _sinc(x: Tensor) -> Tensor:
    """The quotient sin(πx) / (πx), and its series about zero, where derivatives of a quotient are none."""
    y = torch.pi * x
    is_small = y.abs() < 0.1
    square = torch.where(is_small, y, 0.0).square()
    series = 1 - square / 6 * (1 - square / 20 * (1 - square / 42 * (1 - square / 72 * (1 - square / 110))))
    safe = torch.where(is_small, 1.0, y)
    return torch.where(is_small, series, safe.sin() / safe)


@lowers(aten.xlogy.Tensor, aten.xlogy.Scalar_Self, aten.xlogy.Scalar_Other)
def _xlogy(x: Any, y: Any) -> Tensor:
    return _times_log(x, y, 0.0, torch.log)


@lowers(aten.special_xlog1py.default, aten.special_xlog1py.self_scalar, aten.special_xlog1py.other_scalar)
def _xlog1py(x: Any, y: Any) -> Tensor:
    return _times_log(x, y, -1.0, torch.log1p)


def _times_log(x: Any, y: Any, pole: float, logarithm: Callable[[Tensor], Tensor]) -> Tensor:
    """The product x log y, zero where x is and the logarithm is not finite; where it is, x has its slope at 0."""
    given = next(v for v in (x, y) if isinstance(v, Tensor))
    kind = given.dtype if given.is_floating_point() else torch.get_default_dtype()
    x, y = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=kind, device=given.device) for v in (x, y))
    x, y = in_one_type(x, y)
    if not x.is_floating_point():
        x, y = (v.to(torch.get_default_dtype()) for v in (x, y))
    is_empty = (x == 0) & ((y <= pole) | (y == torch.inf))
    return torch.where(is_empty, 0.0, x * logarithm(torch.where(is_empty, pole + 1.0, y)))


@lowers(aten.hardsigmoid.default)
def _hardsigmoid(x: Tensor) -> Tensor:
    return torch.where((x > -3) & (x < 3), x / 6 + 0.5, (x > 0).to(x.dtype))


@lowers(aten.celu.default)
def _celu(x: Tensor, alpha: float = 1.0) -> Any:
    return aten.elu.default(x, alpha, 1.0, 1 / alpha)


@lowers(aten.mish.default)
def _mish(x: Tensor) -> Tensor:
    return x * torch.nn.functional.softplus(x).tanh()


@lowers(aten.addcmul.default)
def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Any:
    is_plain = value == 1 and not a.is_complex() and not b.is_complex() and same_type(x, a, b)
    return NotImplemented if is_plain else x + value * (a * b)


@lowers(aten.addmm.default)
def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    is_plain = beta == alpha == 1 and not a.is_complex() and not b.is_complex()
    return NotImplemented if is_plain else beta * bias + alpha * (a @ b)


@lowers(aten.baddbmm.default)
def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = a @ b if alpha == 1 else alpha * (a @ b)
    return product if beta == 0 else (bias if beta == 1 else beta * bias) + product


@lowers(aten.var.correction)
def _var(x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]  # type: ignore[no-any-return]


@lowers(aten.var_mean.correction)
def _var_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(dim) if dim else list(range(x.dim()))
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    count = x.numel() // max(mean.numel(), 1)
    squares = torch.view_as_real(centred).square().sum(-1) if x.is_complex() else centred.square()
    variance = squares.sum(dims, keepdim=keepdim) / max(count - (1 if correction is None else correction), 0)
    return variance, mean if keepdim else mean.sum(dims)


@lowers(aten.pow.Tensor_Tensor)
def _pow(x: Tensor, exponent: Tensor) -> Any:
    """x^y as exp(y log x) where y is 0, for a y that moves: there torch's derivative by x is the constant 0."""
    if x.is_complex() or exponent.is_complex():
        return complex_power(x, exponent)
    if not exponent.is_floating_point():
        return NotImplemented
    zero = (exponent == 0) & (x > 0)
    elsewhere = torch.where(zero, 1.0, x), torch.where(zero, 1.0, exponent)
    there = (exponent * torch.where(zero, x, 1.0).log()).exp()
    return torch.where(zero, there, as_it_is(aten.pow.Tensor_Tensor, *elsewhere))


@lowers(aten.prod.default)
def _prod(x: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    return _product(x.reshape(-1), 0, False, dtype)


@lowers(aten.prod.dim_int)
def _prod_along(x: Tensor, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    return _product(x, dim, keepdim, dtype) if x.dim() else _product(x.reshape(1), 0, False, dtype)


def _product(x: Tensor, dim: int, keepdim: bool, dtype: torch.dtype | None) -> Any:
    """Products of halves, again and again: torch's formulas for the third derivative miss terms where factors are 0."""
    x = x if dtype is None else x.to(dtype)
    if not (x.is_floating_point() or x.is_complex()) or not x.shape[dim]:
        return NotImplemented
    while x.shape[dim] > 1:
        half = x.shape[dim] // 2
        pairs = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        x = torch.cat([pairs, x.narrow(dim, 2 * half, 1)], dim) if x.shape[dim] % 2 else pairs
    return x if keepdim else x.squeeze(dim)


@lowers(aten.cumprod.default)
def _cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """Products of 2, 4, 8, … entries, each from those of half as many."""
    x = x if dtype is None else x.to(dtype)
    if not x.is_floating_point() and not x.is_complex():
        return NotImplemented
    if not x.dim():
        return x.clone()
    length, reach = x.shape[dim], 1
    while reach < length:
        further = x.narrow(dim, reach, length - reach) * x.narrow(dim, 0, length - reach)
        x = torch.cat([x.narrow(dim, 0, reach), further], dim)
        reach *= 2
    return x.clone() if length < 2 else x


@lowers(aten.std.correction)
def _std(x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return root(_var_mean(x, dim, correction=correction, keepdim=keepdim)[0])


@lowers(aten.std_mean.correction)
def _std_mean(
    x: Tensor, dim: list[int] | None = None, *, correction: float | None = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    variance, mean = _var_mean(x, dim, correction=correction, keepdim=keepdim)
    return root(variance), mean


def _step(op: Any) -> None:
    """Says that a function is constant wherever it has a slope."""
    lowers(op)(lambda x, *args, **kwargs: as_it_is(op, CONSTANT(x), *args, **kwargs))


for _op in (
    aten.floor.default,
    aten.ceil.default,
    aten.trunc.default,
    aten.round.default,
    aten.round.decimals,
    aten.sign.default,
):
    _step(_op)
